"""A small FLUX pipeline of real components, and a slow reference for LoRAs gated by text, region and row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from components import seeded, small_vae, text_config, tokenizer
from lora_compose.attention import Lora, LoraFactors
from lora_compose.pipelines.families.flux import ComposeFluxPipeline

TOKENS = 24
CELLS = 8  # image tokens by side, of 128 pixels


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    """Two double-stream and two single-stream blocks of width 32, all of whose numbers are random."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | changes).eval().requires_grad_(False)


def t5_tokenizer() -> T5Tokenizer:
    """Words and letters, without a start token, and with the space before a word in its token, as T5's."""
    words = ["a", "cat", "and", "dog", "on", "grass", "in", "the", "photo", "of"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words), ("▁", -3.0)]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    return T5Tokenizer(vocab=[*pieces, *letters], extra_ids=0, model_max_length=TOKENS)


def flux_pipeline(cls: Any = ComposeFluxPipeline, **changes: Any) -> Any:
    """A FLUX pipeline of small real components."""
    torch.manual_seed(0)
    words, more_words = tokenizer(), t5_tokenizer()
    t5 = T5Config(vocab_size=len(more_words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(text_config(words)).eval(),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=more_words,
        transformer=flux_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_lora(transformer: nn.Module, seed: int, size: float = 0.2) -> Lora:
    """Random factors for every linear layer; another rank for every seed."""
    generator, rank = torch.Generator().manual_seed(seed), 2 + seed % 3
    return {
        name: LoraFactors(
            torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5,
            torch.randn(module.out_features, rank, generator=generator) * size,
            0.7,
        )
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


@dataclass(frozen=True)
class Places:
    """Where each concept's LoRA acts, without broadcasting.

    Attributes:
        text: Shape: [rows, tokens, concepts].
        image: Shape: [rows, cells, concepts].
        modulation: For the time embedding and modulation layers. Shape: [rows, concepts].
    """

    text: Tensor
    image: Tensor
    modulation: Tensor

    def of(self, name: str) -> Tensor:
        """The gate of a layer, by its name."""
        if ".norm" in name or name.startswith(("norm_out", "time_text_embed")):
            return self.modulation
        if name.startswith("single_transformer_blocks"):
            return torch.cat([self.text, self.image], dim=1)
        text = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
        return self.text if any(part in name for part in text) else self.image


@contextmanager
def dense_loras(transformer: nn.Module, loras: Sequence[Lora], places: Callable[[int], Places]) -> Iterator[None]:
    """Adds dense deltas concept by concept in forward hooks; `places` gives the gates for so many rows."""
    handles = []
    for name, module in transformer.named_modules():
        mine = [(i, lora[name].delta()) for i, lora in enumerate(loras) if name in lora]
        if mine:
            handles.append(module.register_forward_hook(_hook(name, mine, places)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, deltas: Sequence[tuple[int, Tensor]], places: Callable[[int], Places]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gate = places(len(given[0])).of(name)
        for i, delta in deltas:
            output = output + gate[..., i : i + 1] * nn.functional.linear(given[0], delta)
        return output

    return hook


def as_file(lora: Lora) -> Mapping[str, Tensor]:
    """A LoRA in diffusers' keys, alpha folded in."""
    tensors = {}
    for name, factors in lora.items():
        tensors[f"transformer.{name}.lora_A.weight"] = factors.down
        tensors[f"transformer.{name}.lora_B.weight"] = factors.up * factors.scale
    return tensors


def plain_latents(pipe: Any, **arguments: Any) -> Tensor:
    """What diffusers' own pipeline gives, packed."""
    plain = FluxPipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    output: Any = plain(**{"generator": seeded(3), "output_type": "latent", **arguments})
    return output.images
