"""Small real components for the tests: `from components import sd_unet`. Everything runs offline on the CPU."""

import copy
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_compose.attention import Gates, How, Installation, Lora, LoraFactors, backbone_of, install
from lora_compose.attention.backbones.unet import AttentionLayer, UNetBackbone
from lora_compose.pipelines.concepts.library import ConceptLibrary
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from made_once import made_once

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv", "conv_shortcut",
              "time_emb_proj", "conv_in", "conv_out", "time_embedding.linear_1")  # fmt: skip


@made_once
def sd_unet(**changes: Any) -> UNet2DConditionModel:
    """SD1.5's block structure (three attention levels of two layers, convolutional projections) with few channels."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | changes).eval()


@made_once
def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL's block structure (0, 2 and 10 transformer layers, linear projections, added conditions), few channels."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4, 8),
        "use_linear_projection": True,
        "norm_num_groups": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    return UNet2DConditionModel(**config | changes).eval()


def attention_layers(unet: Any) -> tuple[AttentionLayer, ...]:
    """The attention layers of a UNet, in forward order."""
    return UNetBackbone(unet)._layers


def random_lora(
    model: nn.Module,
    seed: int,
    *,
    rank: int = 3,
    scale: float = 1.0,
    targets: tuple[str, ...] = ATTENTION,
    size: float = 0.3,
) -> Lora:
    """Factors for every layer whose name ends with one of the targets; the delta is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not any(f".{name}".endswith(f".{t}") for t in targets):
            continue
        out, *inputs = module.weight.shape
        up_shape = (out, rank, 1, 1) if isinstance(module, nn.Conv2d) else (out, rank)
        down = torch.randn(rank, *inputs, generator=generator) * size
        factors[name] = LoraFactors(down, torch.randn(up_shape, generator=generator) * size, scale)
    return factors


def text_loras(pipe: Any, seed: int, targets: tuple[str, ...] = ("q_proj", "v_proj", "fc1"), **how: Any) -> Any:
    """Random factors for every text encoder of a pipeline, by component name."""
    parts = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {
        name: random_lora(model, seed + 100 * n, targets=targets, **how)
        for n, (name, model) in enumerate(parts.items())
        if model is not None
    }


def lora_tensors(**parts: Lora) -> dict[str, Tensor]:
    """The tensors of a LoRA file of diffusers with these factors, by component (`unet`, `text_encoder`, ...)."""
    return {
        f"{part}.{layer}.lora_{side}.weight": tensor.contiguous()
        for part, lora in parts.items()
        for layer, factors in lora.items()
        for side, tensor in (("A", factors.down * factors.scale), ("B", factors.up))
    }


def kohya_tensors(**parts: Lora) -> dict[str, Tensor]:
    """The tensors of a LoRA file of kohya's scripts for SDXL with these factors, by component."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    tensors = {}
    for part, lora in parts.items():
        for layer, factors in lora.items():
            key = prefixes[part] + layer.removeprefix("text_model.").replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": factors.down, f"{key}.lora_up.weight": factors.up}
            tensors[f"{key}.alpha"] = torch.tensor(float(len(factors.down)) * factors.scale)
    return tensors


def save_lora(path: Path, metadata: dict[str, str] | None = None, /, **parts: Lora) -> Path:
    """Writes factors as a LoRA file of diffusers, by component."""
    save_file(lora_tensors(**parts), path, metadata={"format": "pt", **(metadata or {})})
    return path


def with_library(pipe: Any, library: ConceptLibrary) -> Any:
    """The pipeline with concepts that were loaded into another one of the same weights, which takes far less time."""
    pipe.__dict__["_concept_library"] = copy.deepcopy(library)
    return pipe


def activated(model: nn.Module, *, size: float, seed: int = 0) -> Any:
    """A control model with random numbers where it starts with zeros, so that it changes the image untrained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=size, generator=generator)
    return model.eval()


def filled(model: nn.Module, seed: int = 0) -> Any:
    """A text encoder with random numbers of our own: each version of transformers fills CLIP and T5 in its own way."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def tokenizer() -> CLIPTokenizer:
    """A small vocabulary by CLIP's rules, with common triggers as words; reads 32 tokens."""
    return CLIPTokenizer.from_pretrained(Path(__file__).with_name("fixtures") / "tokenizer")


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    """A small text encoder for these words."""
    config: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    return CLIPTextConfig(**config | changes)


def small_vae(**changes: Any) -> AutoencoderKL:
    """A VAE with 8 pixels per latent cell and side."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 128,
    }  # fmt: skip
    return AutoencoderKL(**config | changes).eval()


def small_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


@made_once
def small_components() -> dict[str, Any]:
    """What a Stable Diffusion pipeline has beside its UNet."""
    torch.manual_seed(0)
    words, vae = tokenizer(), small_vae()
    text_encoder = CLIPTextModel(text_config(words)).eval()
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": words, "scheduler": small_scheduler()}


def small_pipeline(cls: type = ComposeStableDiffusionPipeline, unet: UNet2DConditionModel | None = None) -> Any:
    """A Stable Diffusion pipeline of small real components, whose tokenizer reads 32 tokens."""
    return cls(
        **small_components(),
        unet=unet or sd_unet(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@made_once
def xl_components() -> dict[str, Any]:
    """What an SDXL pipeline has beside its UNet."""
    torch.manual_seed(0)
    words, more_words = tokenizer(), tokenizer()
    first = text_config(words, hidden_size=8, num_attention_heads=2, num_hidden_layers=3)
    second = text_config(words, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, projection_dim=12)
    more_words.pad_token = "!"  # as SDXL's second tokenizer, whose padding differs
    return {
        "vae": small_vae(force_upcast=True), "text_encoder": CLIPTextModel(first).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(second).eval(), "tokenizer": words, "tokenizer_2": more_words,
        "scheduler": small_scheduler(),
    }  # fmt: skip


def xl_pipeline(cls: Any = ComposeStableDiffusionXLPipeline, unet: UNet2DConditionModel | None = None) -> Any:
    """An SDXL pipeline of small real components: two text encoders of 8 and 16 channels, pooled text of 12."""
    pipe = cls(**xl_components(), unet=unet or sdxl_unet(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.encode_prompt("")  # transformers leaves hooks in a model that is first asked for hidden states
    return pipe


def unet_inputs(
    unet: UNet2DConditionModel, *, rows: int = 2, grid: tuple[int, int] = (16, 16), tokens: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Random inputs for a whole UNet pass, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = unet.config
    inputs: dict[str, Any] = {
        "sample": torch.randn(rows, config.in_channels, *grid, generator=generator),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(rows, tokens, config.cross_attention_dim, generator=generator),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(rows, 1)
        text = torch.randn(rows, pooled, generator=generator)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": time_ids}
    return inputs


def installed(
    unet: nn.Module,
    loras: Sequence[Lora] = (),
    *,
    dtype: torch.dtype = torch.float32,
    silence: Sequence[str] = (),
    how: How = "module",
) -> AbstractContextManager[Installation]:
    """Concepts installed in a UNet on the CPU, for as long as the `with` block lasts."""
    return install(backbone_of(unet), loras, device=torch.device("cpu"), dtype=dtype, silence=silence, how=how)


def with_bank(
    unet: Any,
    loras: Sequence[Lora],
    gates: Gates,
    inputs: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    how: How = "module",
) -> Tensor:
    """What one forward pass gives with concepts installed for it alone."""
    with installed(unet, loras, dtype=dtype, how=how) as installation:
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
        return unet(**inputs)[0]


# Two levels of one layer each, for everything that does not depend on the structure of the UNet.
TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def tiny_unet(**changes: Any) -> Any:
    """Two levels of one layer each, with the names of Stable Diffusion."""
    return sd_unet(**TINY | changes)


def shallow_sdxl_unet() -> UNet2DConditionModel:
    """SDXL's block structure with a transformer layer or two where SDXL has up to ten."""
    return sdxl_unet(transformer_layers_per_block=(1, 1, 2), layers_per_block=1)


# The same for SDXL: no attention on the first level, as there.
TINY_XL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (0, 2),
    "attention_head_dim": (2, 4),
}


def tiny_xl_pipeline(cls: Any = ComposeStableDiffusionXLPipeline) -> Any:
    """A still smaller pipeline than `xl_pipeline`."""
    return xl_pipeline(cls, unet=sdxl_unet(**TINY_XL))


def tiny_pipeline(cls: Any = ComposeStableDiffusionPipeline) -> Any:
    """A still smaller pipeline than `small_pipeline`, without a progress bar."""
    pipe = small_pipeline(cls, unet=sd_unet(**TINY))
    pipe.set_progress_bar_config(disable=True)
    return pipe


FAMILIES = {"sd": tiny_pipeline, "sdxl": tiny_xl_pipeline}
"""Makes a tiny pipeline of a family, of the composing class or of the one that is given."""
WHOLE = {"sd": small_pipeline, "sdxl": xl_pipeline}
"""Makes a small pipeline of a family with all levels of its UNet, whose maps have a quarter of the rows and columns."""


def seeded(seed: int = 0) -> torch.Generator:
    """A generator for a call."""
    return torch.Generator().manual_seed(seed)


class State:
    """Everything about a pipeline that a call must leave alone, compared by identity and by bits."""

    def __init__(self, pipe: Any) -> None:
        self.models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.tree = {name: repr(model) for name, model in self.models.items()}
        self.modules = self._modules()
        self.tensors = self._tensors()
        self.bits = [tensor.clone() for tensor, _ in self.tensors.values() if not tensor.is_meta]
        self.processors = dict(pipe.unet.attn_processors)
        self.adapters = self._adapters()
        self.rng = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        self.pipe = pipe

    def _modules(self) -> dict[str, tuple]:
        return {
            f"{part}.{name}": (module, module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for part, model in self.models.items()
            for name, module in model.named_modules()
        }

    def _tensors(self) -> dict[str, tuple[Tensor, bool]]:
        return {
            f"{part}.{name}": (tensor, tensor.requires_grad)
            for part, model in self.models.items()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    def _adapters(self) -> dict[str, Any]:
        return {
            f"{part}.{name}": (
                dict(module.scaling), list(module.active_adapters), module.disable_adapters, module.merged,
            )
            for part, model in self.models.items()
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }  # fmt: skip

    def assert_unchanged(self) -> None:
        assert {name: repr(model) for name, model in self.models.items()} == self.tree
        assert self._modules() == self.modules
        now = self._tensors()
        assert now.keys() == self.tensors.keys()
        for name, (tensor, requires_grad) in now.items():
            assert tensor is self.tensors[name][0], name
            assert requires_grad == self.tensors[name][1], name
            assert tensor.grad is None, name
        for tensor, bits in zip((t for t, _ in now.values() if not t.is_meta), self.bits, strict=True):
            assert torch.equal(tensor, bits)
        processors = self.pipe.unet.attn_processors
        assert processors.keys() == self.processors.keys()
        assert all(processors[name] is self.processors[name] for name in processors)
        assert self._adapters() == self.adapters
        assert torch.equal(torch.get_rng_state(), self.rng[0])
        assert random.getstate() == self.rng[1]
        assert str(np.random.get_state()) == self.rng[2]
