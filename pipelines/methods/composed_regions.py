"""Regions that each read a text of their own, in one pass; in the first steps each can have a canvas of its own."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import ActingRows
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.apart import RegionCanvases, canvases_of
from lora_compose.pipelines.methods.region_pass import Inject, region_pass
from lora_compose.pipelines.methods.region_texts import RegionTexts
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.regions import Regions
from lora_compose.pipelines.text.conditioning import Conditioning

APART_SIDE = 0.5
"""Least side of a region's own canvas, as a fraction of the model's native resolution."""


@dataclass(frozen=True, eq=False)
class ComposedRegions:
    """The process that denoises given regions, without updates of the latents.

    Attributes:
        text: Text 0, of the canvas.
        whole: The pass of the whole canvas, in which regions are isolated if they ever are.
        later: The same where regions are open to each other.
        canvases: The canvases on which regions are denoised apart; None if they are not.
        apart: In this fraction of the steps, from the first, regions are denoised apart.
        isolate: In this fraction of the steps, from the first, regions are isolated.
    """

    session: Session
    text: Conditioning
    whole: PreparedPass
    later: PreparedPass
    canvases: RegionCanvases | None
    apart: float
    isolate: float

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """The latents as they are."""
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The prediction with guidance, of the whole canvas or of each region on its own."""
        if self.canvases is not None and step.within(self.apart):
            return latents, self.canvases.predict(self.session, latents, step, lambda: self._together(latents, step))
        return latents, self._together(latents, step)

    def _together(self, latents: Tensor, step: Step) -> Tensor:
        whole = self.whole if step.within(self.isolate) else self.later
        return self.session.guider.combine(self.session.denoiser.predict(latents, step, whole), step)


def compose_regions(
    session: Session,
    regions: Regions,
    texts: RegionTexts,
    *,
    isolate: float,
    apart: float,
    apart_side: float = APART_SIDE,
    inject: Inject = "full",
    rows: ActingRows = "cond_only",
    image: int | None = None,
) -> ComposedRegions:
    """The process for given regions.

    Args:
        regions: On all grids.
        isolate: In this fraction of the steps, from the first, the cells of a region see no other in self-attention.
        apart: In this fraction of the steps, from the first, every region is denoised on a canvas of its own.
        apart_side: Least side of those canvases, as a fraction of the model's native resolution.
        inject: Where LoRAs act in their regions.
        rows: Where LoRAs act under guidance.
        image: Index of the image, if each image has its own regions.
    """
    pass_of = partial(region_pass, session, isolate=isolate > 0, rows=rows, inject=inject, image=image)
    whole = later = session.denoiser.prepare(pass_of(texts.together, regions))
    if 0 < isolate < 1:
        later = session.denoiser.prepare(pass_of(texts.together, regions, isolate=False), whole)
    side = session.canvas.backbone.native_side * apart_side
    canvases = canvases_of(session, texts.alone, regions, side, whole, pass_of) if apart > 0 else None
    return ComposedRegions(session, texts.background, whole, later, canvases, apart, isolate)
