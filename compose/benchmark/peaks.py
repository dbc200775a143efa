"""Peak memory of a call on models of full size, run without values on the meta device.

UNet, LoRAs and everything that passes keep are counted; decoding is counted by itself. Not counted are text encoders,
which `enable_model_cpu_offload` moves away, and the memory of a device's libraries and allocator.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lora_compose.attention.sites import Grid
from lora_compose.compose.benchmark.counting import count
from lora_compose.compose.benchmark.memory import PeakMemory, added_memory
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.methods import Settings


@dataclass(frozen=True)
class Peak:
    """The peak of one call, UNet included, its FLOPs, and whether it has passes with a gradient."""

    peak_bytes: int
    flops: int
    updates: bool


def peak(
    unet: UNet2DConditionModel,
    concepts: Sequence[LoadedConcept],
    settings: Settings | None,
    steps: int,
    guidance_scale: float,
    image_size: Grid,
    *,
    gradient_checkpointing: bool = False,
    tokens: int = 77,
) -> Peak:
    """Computes the memory of a call on a device with fused attention.

    Args, errors: as for `count`; the UNet is in the precision of the call. With `gradient_checkpointing`, passes with a
    gradient compute their activations twice instead of keeping them.
    """
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=_recomputing))
    memory = added_memory("meta", [*unet.parameters(), *unet.buffers()])
    try:
        counted = count(
            unet, concepts, settings, steps, guidance_scale, image_size, tokens=tokens, watched=watched(memory)
        )
    finally:
        unet.disable_gradient_checkpointing()
    return Peak(memory.peak_bytes, counted.flops, counted.rows_backward > 0)


def decoding_bytes(vae: AutoencoderKL | AutoencoderKLQwenImage, image_size: Grid) -> int:
    """Peak memory while one image is decoded, by a VAE on the meta device, which is included."""
    if isinstance(vae, AutoencoderKLQwenImage):  # one for videos
        scale, channels, frames = 8, vae.config["z_dim"], [1]
    else:
        scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
        channels, frames = vae.config["latent_channels"], []
    grid = (side // scale for side in image_size)
    latents: Any = torch.empty(1, channels, *frames, *grid, device="meta", dtype=vae.dtype)
    memory = added_memory("meta", [*vae.parameters(), *vae.buffers()])
    with torch.no_grad(), watched(memory):
        vae.decode(latents)
    return memory.peak_bytes


def _recomputing() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Enters a mode around a block and around its recomputation, for which PyTorch leaves function modes."""
    return nullcontext(), FusedAttention()


@contextmanager
def watched(memory: PeakMemory) -> Iterator[None]:
    """Watches memory, with fused attention."""
    with FusedAttention(), memory:
        yield


class FusedAttention(TorchFunctionMode):
    """Fused attention: on the meta device, PyTorch would keep the matrix of attention weights."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
