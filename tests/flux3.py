"""Small FLUX.3 pipelines of real components, guided and distilled."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from flux2 import LAYERS, flux2_vae
from flux2_dev import TextProcessor
from lora_compose.pipelines.families.flux3 import LAYERS as DEFAULT_LAYERS
from lora_compose.pipelines.families.flux3 import ComposeFlux3DistilledPipeline, ComposeFlux3Pipeline
from made_once import made_once
from qwen import TEMPLATE, qwen3_vl, qwen_tokenizer, without_zeros
from transformer_families import Family, Places


def flux3_transformer(**changes: Any) -> Flux3Transformer2DModel:
    """A block for each kind of token and three for all of them, of width 32."""
    config: dict[str, Any] = {
        "in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 72, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    return without_zeros(Flux3Transformer2DModel(**config | changes))


@made_once
def flux3_pipeline(cls: Any = ComposeFlux3Pipeline, layers: int = 3, **changes: Any) -> Any:
    """A FLUX.3 pipeline of small real components, whose text encoder has so many layers."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    config: Any = qwen3_vl(len(words), layers).config
    pipe = cls(
        tokenizer=TextProcessor(words, chat_template=TEMPLATE),
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_dict())).eval(),
        transformer=flux3_transformer(**changes),
        vae=flux2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def default_flux3(cls: Any = ComposeFlux3Pipeline, **changes: Any) -> Any:
    """A FLUX.3 pipeline whose text encoder has the layers that calls read by default."""
    return flux3_pipeline(cls, max(DEFAULT_LAYERS), joint_attention_dim=24 * len(DEFAULT_LAYERS), **changes)


class PlainFlux3:
    """diffusers' modular pipeline without its upsampler, called as its classic pipelines are."""

    kind: Any = ComposeFlux3Pipeline

    def __init__(self, **components: Any) -> None:
        blocks = self.kind.blocks_class()
        blocks.sub_blocks.pop("prompt_upsampler")
        self.pipe: Any = blocks.init_pipeline()
        self.pipe.update_components(**components)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Its blocks have progress bars of their own."""

    def __call__(self, guidance_scale: float | None = None, output_type: str = "pil", **inputs: Any) -> Any:
        """The guider has the scale, and an output is named instead of a type."""
        if guidance_scale is not None:
            self.pipe.update_components(guider=self.pipe.guider.new(guidance_scale=guidance_scale))
        if output_type == "latent":
            return SimpleNamespace(images=self.pipe(**inputs, output="latents"))
        return SimpleNamespace(images=self.pipe(**inputs, output_type=output_type, output="images"))


class PlainFlux3Distilled(PlainFlux3):
    """As `PlainFlux3`, of the distilled model."""

    kind = ComposeFlux3DistilledPipeline


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of FLUX.3."""
    if "timestep_embedder" in name:
        return places.modulation
    cells = places.image.shape[1]
    if name.startswith("single_transformer_blocks"):
        image = places.image[:, : x.shape[1] - places.text.shape[1]]
        return torch.cat([places.text, image], dim=1)
    if "txt" in name or name.startswith("context"):
        return places.text
    # Cells of reference images are behind the others.
    return places.image[:, cells - x.shape[1] :] if "image_cond" in name else places.image[:, : x.shape[1]]


# After "<|im_start|>", "user" and a line break, as in FLUX.2.
FLUX3 = Family(
    pipeline=flux3_pipeline,
    plain=PlainFlux3,
    gate=gate,
    words=((5, 6, 7), (12, 13, 14)),
    guided={"negative_prompt": "the photo", "guidance_scale": 2.0, "text_encoder_out_layers": LAYERS},
    unguided={"guidance_scale": 1.0, "text_encoder_out_layers": LAYERS},
    by_default=default_flux3,
)
FLUX3_DISTILLED = replace(
    FLUX3,
    pipeline=partial(flux3_pipeline, ComposeFlux3DistilledPipeline, flow_map=True),
    plain=PlainFlux3Distilled,
    guided={},
    unguided={"text_encoder_out_layers": LAYERS},
    by_default=partial(default_flux3, ComposeFlux3DistilledPipeline, flow_map=True),
)
