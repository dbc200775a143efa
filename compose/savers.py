"""Ways to need less memory, by name: on the command line, in suites and in the page."""

from collections.abc import Collection
from enum import StrEnum
from typing import Any


class Saver(StrEnum):
    """A way to need less memory, and more time. What is drawn stays the same, up to rounding and the seams of tiles."""

    TILING = "tiling"
    MODEL_OFFLOAD = "model-offload"
    SEQUENTIAL_OFFLOAD = "sequential-offload"
    GRADIENT_CHECKPOINTING = "gradient-checkpointing"


SAVERS = {
    Saver.TILING: "decode in tiles",
    Saver.MODEL_OFFLOAD: "parts of the model on the CPU until needed",
    Saver.SEQUENTIAL_OFFLOAD: "layers on the CPU until needed, slow",
    Saver.GRADIENT_CHECKPOINTING: "compute twice instead of keeping, in updates of lora-composer and clora",
}
"""What they do."""

OFFLOADS = frozenset({Saver.MODEL_OFFLOAD, Saver.SEQUENTIAL_OFFLOAD})
"""Those with which parts of the model move between devices during a call."""


def check_savers(savers: Collection[Saver], device: str) -> None:
    """Raises ValueError where ways to save memory do not go together, or not with the device."""
    offloads = sorted(OFFLOADS & set(savers))
    if len(offloads) > 1:
        raise ValueError(f"{' and '.join(offloads)} do not go together; choose one")
    if offloads and device == "cpu":
        raise ValueError(
            f"{offloads[0]} keeps on the CPU what an accelerator does not need yet, and there is no other device"
        )


def place(pipe: Any, device: str, savers: Collection[Saver]) -> None:
    """Puts a pipeline, just opened, on a device.

    Raises:
        ValueError: As `check_savers`, before anything is changed.
    """
    check_savers(savers, device)
    if Saver.TILING in savers:
        pipe.vae.enable_tiling()
    if Saver.GRADIENT_CHECKPOINTING in savers:
        pipe.unet.enable_gradient_checkpointing()
    if Saver.MODEL_OFFLOAD in savers:
        pipe.enable_model_cpu_offload(device=device)
    elif Saver.SEQUENTIAL_OFFLOAD in savers:
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
