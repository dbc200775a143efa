"""A small Anima pipeline of real components."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models import AnimaTextConditioner
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from torch import Tensor

from flux import t5_tokenizer
from lora_compose.pipelines.families.anima import ComposeAnimaPipeline
from made_once import made_once
from qwen import qwen3_base, qwen_tokenizer, without_zeros
from transformer_families import TOKENS, Family, Places


def cosmos_transformer(**changes: Any) -> CosmosTransformer3DModel:
    """Three blocks of width 36; without a padding mask, for which diffusers needs torchvision."""
    config: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 18, "num_layers": 3,
        "mlp_ratio": 2.0, "text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (4, 32, 32),
        "extra_pos_embed_type": None, "concat_padding_mask": False,
    }  # fmt: skip
    return without_zeros(CosmosTransformer3DModel(**config | changes))


@made_once
def anima_pipeline(cls: Any = ComposeAnimaPipeline, **changes: Any) -> Any:
    """An Anima pipeline of small real components, whose texts are padded to as many tokens as those of other tests."""
    torch.manual_seed(0)
    words, t5 = qwen_tokenizer(), t5_tokenizer()
    conditioner = AnimaTextConditioner(
        source_dim=24, target_dim=24, model_dim=24, num_layers=2, num_attention_heads=2, target_vocab_size=len(t5),
        min_sequence_length=TOKENS,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5],
    )  # fmt: skip
    pipe = cls(
        tokenizer=words,
        text_encoder=qwen3_base(len(words)),
        t5_tokenizer=t5,
        text_conditioner=without_zeros(conditioner),
        transformer=cosmos_transformer(**changes),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class PlainAnima:
    """diffusers' modular pipeline, called as its classic pipelines are."""

    def __init__(self, **components: Any) -> None:
        self.pipe: Any = AnimaAutoBlocks().init_pipeline()
        self.pipe.update_components(**components)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Its blocks have progress bars of their own."""

    def __call__(self, guidance_scale: float = 4.0, output_type: str = "pil", **inputs: Any) -> Any:
        """The guider has the scale, and an output is named instead of a type."""
        self.pipe.update_components(guider=self.pipe.guider.new(guidance_scale=guidance_scale))
        if output_type == "latent":
            return SimpleNamespace(images=self.pipe(**inputs, output="latents"))
        return SimpleNamespace(images=self.pipe(**inputs, output_type=output_type, output="images"))


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Cosmos."""
    if "norm" in name or name.startswith("time"):
        return places.modulation
    if name.endswith(("attn2.to_k", "attn2.to_v")):
        return places.text
    return places.image.unflatten(1, x.shape[1:4]) if name.startswith("patch_embed") else places.image


# T5's tokens: "a", a space, "s", "k", "s", "cat", "and", "a", a space, "z", "w", "x", "dog", "on", "grass".
ANIMA = Family(
    pipeline=anima_pipeline,
    plain=PlainAnima,
    gate=gate,
    words=((1, 2, 3, 4), (8, 9, 10, 11)),
    guided={"negative_prompt": "the photo", "guidance_scale": 2.0},
    unguided={"guidance_scale": 1.0},
    image_tasks={False: PlainAnima},
)
