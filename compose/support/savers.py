"""Options that save memory, by name: on the command line, in suites and in the page."""

from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator


class Saver(StrEnum):
    """An option that saves memory and costs time. Images stay the same up to rounding and the seams of tiles."""

    TILING = "tiling"
    MODEL_OFFLOAD = "model-offload"
    SEQUENTIAL_OFFLOAD = "sequential-offload"
    GRADIENT_CHECKPOINTING = "gradient-checkpointing"


SAVERS = {
    Saver.TILING: "decode in tiles of 512 pixels",
    Saver.MODEL_OFFLOAD: "parts of the model on the CPU until needed",
    Saver.SEQUENTIAL_OFFLOAD: "layers on the CPU until needed, slow",
    Saver.GRADIENT_CHECKPOINTING: "keep few activations and compute them twice, in updates of lora-composer and clora",
}
"""The effect of each option."""

OFFLOADS = frozenset({Saver.MODEL_OFFLOAD, Saver.SEQUENTIAL_OFFLOAD})
"""Options that move parts of the model between devices during a call."""


TILE = 512
"""Pixels. diffusers itself takes tiles of the size that a VAE was made for, so that SDXL's images are one tile."""


def in_order(savers: Iterable[Saver]) -> tuple[Saver, ...]:
    """The options without duplicates, in the order of the enum."""
    given = frozenset(savers)
    return tuple(saver for saver in Saver if saver in given)


def check_savers(savers: Collection[Saver], device: str | None = None) -> None:
    """Raises ValueError for options that cannot be combined, with each other or with a known device."""
    offloads = sorted(OFFLOADS & set(savers))
    if len(offloads) > 1:
        raise ValueError(f"{' and '.join(offloads)} do not go together; choose one")
    if offloads and device == "cpu":
        raise ValueError(
            f"{offloads[0]} keeps on the CPU what an accelerator does not need yet, and there is no other device"
        )


def _combined(savers: tuple[Saver, ...]) -> tuple[Saver, ...]:
    check_savers(savers)
    return in_order(savers)


Savers = Annotated[tuple[Saver, ...], AfterValidator(_combined)]
"""A field of options that can be combined, without duplicates and in the order of the enum."""


def place(pipe: Any, device: str, savers: Collection[Saver]) -> None:
    """Puts a pipeline, just opened, on a device, with options that save memory.

    Raises:
        ValueError: As `check_savers`, before anything is changed.
    """
    check_savers(savers, device)
    if Saver.TILING in savers:
        enable_tiling(pipe.vae)
    if Saver.GRADIENT_CHECKPOINTING in savers:
        pipe.model.enable_gradient_checkpointing()
    if Saver.MODEL_OFFLOAD in savers:
        pipe.enable_model_cpu_offload(device=device)
    elif Saver.SEQUENTIAL_OFFLOAD in savers:
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def enable_tiling(vae: Any) -> None:
    """Has a VAE decode in tiles of at most `TILE` pixels."""
    vae.enable_tiling()
    if not hasattr(vae, "tile_latent_min_size"):  # a VAE for videos, whose own tiles are smaller
        return
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = min(TILE // scale, vae.tile_latent_min_size)
    vae.tile_sample_min_size = vae.tile_latent_min_size * scale
