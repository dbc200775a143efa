"""LoRA-Composer, beyond the paper: in the first steps every region is denoised on a canvas of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.regions import Regions, Window
from lora_compose.pipelines.text.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class RegionCanvas:
    """A part of the canvas on which one region is denoised alone.

    Attributes:
        window: Rows and columns of the latents in the region.
        shown: True where its result is used: in the region, and outside all regions. Shape: [rows, columns].
    """

    window: Window
    shown: Tensor
    prepared: PreparedPass


@dataclass(frozen=True, eq=False)
class RegionCanvases:
    """The canvases of all regions, and whether they cover the whole canvas."""

    canvases: Sequence[RegionCanvas]
    complete: bool

    def predict(self, session: Session, latents: Tensor, step: Step, whole: Callable[[], Tensor]) -> Tensor:
        """Guided predictions of every region and its surroundings, averaged where canvases overlap.

        Args:
            latents: Latents of the whole canvas.
            whole: Predicts the whole canvas, for cells that no part shows.
        """
        total, times = torch.zeros_like(latents), torch.zeros_like(latents[:1, :1])
        for part in self.canvases:
            here = (..., *part.window)
            prediction = session.denoiser.predict(latents[here].contiguous(), step, part.prepared)
            total[here] += session.guider.combine(prediction, step) * part.shown
            times[here] += part.shown
        if self.complete:
            return total / times
        return torch.where(times > 0, total / times.clamp(min=1), whole())


def canvases_of(
    session: Session,
    texts: Sequence[Conditioning],
    regions: Regions,
    side: float,
    whole: PreparedPass,
    make_pass: Callable[[Conditioning, Regions, Window], Pass],
) -> RegionCanvases:
    """A canvas for each region.

    Args:
        texts: The texts on the canvas of each region.
        regions: On all grids.
        side: Least side of a canvas in latent cells.
        whole: The pass of the whole canvas, which has the same text.
        make_pass: The pass of a region, from its text, regions and window.
    """
    canvases, seen = [], torch.zeros(regions.grid, dtype=torch.bool)
    for n, text in enumerate(texts):
        window = regions.window(n, side)
        alone = regions.part(window, n)
        inside, all_here = alone.cells[0][..., n], regions.cells[0][window]
        shown = inside | ~all_here.any(dim=-1)
        seen[window] |= shown
        height, width = (cells / full for cells, full in zip(shown.shape, regions.grid, strict=True))
        spec = make_pass(text.on_part(height, width), alone, window)
        prepared = session.denoiser.prepare(spec, same_text_as=whole)
        canvases.append(RegionCanvas(window, shown.to(session.canvas.device), prepared))
    return RegionCanvases(canvases, complete=bool(seen.all()))
