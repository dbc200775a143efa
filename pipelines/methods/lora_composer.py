"""LoRA-Composer: a region, a text and a LoRA for every concept.

Yang et al., "LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free Diffusion
Models", arXiv 2403.11627. What happens in the regions M_n of the concepts, on every grid:

    concept injection (eq. 1-2):    cells of M_n read the concept's own text with the concept's LoRA, the rest of the
                                    canvas reads a text without the concepts
    concept isolation (3.4):        cells of M_n see M_n and the background in self-attention, but no other region
    latent re-initialisation (3.5): every concept starts from the noise in which its words find most to look at
    updates (eq. 3-10):             z <- z - phi_t dL/dz, with L over the attention maps of the map grid: every
                                    concept's words attend inside its region (L_ce) and fill it (L_fill), and its cells
                                    do not look outside (L_region)

Beyond the paper, every region can be denoised on a canvas of its own at first (`apart`). The paper isolates attention
only, but convolutions mix regions too, and the layout of an image is decided in the first steps: two neighbouring
regions may then agree on a single object across their border. Where regions cover the canvas this costs nothing.

A concept without a region acts in the background text and on the whole canvas. So does a style, which has no region and
no loss, and takes no part in isolation. Where paper and code disagree, `LoraComposer.paper` and `LoraComposer.official`
have the settings of each. `docs/methods/lora-composer.md` measures the contribution of each mechanism.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention.device import to_device
from lora_compose.attention.masks import smooth
from lora_compose.pipelines.denoising.passes import AttentionMaps, MapLoss, MapRequest
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import (
    ActingRows,
    Needs,
    Process,
    Settings,
    check_choices,
    check_regions,
    warn_unread,
)
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.composed_regions import APART_SIDE, ComposedRegions, compose_regions
from lora_compose.pipelines.methods.latent_update import StepRule, descend
from lora_compose.pipelines.methods.losses import concentration, filling, outside_attention
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.region_pass import Inject
from lora_compose.pipelines.methods.region_texts import Background, region_texts
from lora_compose.pipelines.methods.reinit import reinitialised
from lora_compose.pipelines.methods.targets import Target, targets_of, unmoved
from lora_compose.pipelines.scene.canvas import Step, steps_in
from lora_compose.pipelines.scene.regions import Regions
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.missing import Described
from lora_compose.pipelines.text.prompts import about

Reinit = Literal["off", "copy", "swap"]


@dataclass(frozen=True)
class LoraComposer(Settings):
    """Every region has its own text and LoRA, and objects are moved into their regions.

    Every mechanism can be switched off on its own.

    Attributes:
        inject: Where a concept's LoRA acts in its region: "attn2", on keys, values and output of cross-attention, as
            the paper has it; "full", in every layer that it adapts, since LoRAs of most trainers keep much of a
            subject's appearance outside of cross-attention (time layers have no cells, so a LoRA there acts on the
            whole canvas); "off", nowhere: all cells read the background text, and there are no losses.
        rows: Where LoRAs act under guidance: "all", also on unconditional rows, as in the authors' code; "cond_only",
            on conditional rows.
        isolate: Whether the cells of a region see no other region in self-attention.
        threshold: A cell belongs to a region that covers at least this share of it; 1 takes only cells that lie inside
            completely, as in the authors' code.
        step_size: Size of an update of the latents; 0 switches updates off.
        step_rule: "raw" multiplies the gradient, as published; "rms" a gradient of root mean square 1.
        step_decay: The step size is multiplied by (1 - i / (2 (n - 1)))^decay in step i of n: 0.5 in the code (a square
            root), 1 in the paper (linear).
        least_updates: Every image is updated in this fraction of the steps, and then until its loss rises.
        most_updates: No image is updated after this fraction of the steps; 0 switches updates off.
        ce_weight: Weight of L_ce, the mean over a concept's words; 0 switches it off.
        fill_weight: Weight of L_fill, the sum of the deviations of both profiles, averaged over a concept's words.
        region_weight: Weight of L_region.
        gaussian: Whether L_ce counts the middle of a region more than its borders.
        apart: In this fraction of the steps, from the first, every region is denoised on a canvas of its own.
        apart_side: Least side of those canvases, as a fraction of the model's native resolution; a smaller region is
            surrounded by background.
        background: Text of the cells outside all regions: "surroundings", the prompt without the concepts, or "scene",
            the whole prompt without triggers, as in the authors' code.
        reinit: Moves the most attended patch of noise into the region before the first step: "copy", as in the authors'
            code, or "swap", which exchanges the two patches and keeps the noise white.
    """

    inject: Inject = "full"
    rows: ActingRows = "cond_only"
    isolate: bool = True
    threshold: float = 1.0
    step_size: float = 0.05
    step_rule: StepRule = "rms"
    step_decay: float = 0.5
    least_updates: float = 0.1
    most_updates: float = 0.5
    ce_weight: float = 16.0
    fill_weight: float = 4.0
    region_weight: float = 10.0
    gaussian: bool = True
    reinit: Reinit = "off"
    apart: float = 0.4
    apart_side: float = APART_SIDE
    background: Background = "surroundings"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("threshold", "least_updates", "most_updates", "apart", "apart_side"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("step_size", "step_decay", "ce_weight", "fill_weight", "region_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and it is {getattr(self, name)}")

    @classmethod
    def official(cls) -> "LoraComposer":
        """The settings of the authors' code, without its mistakes (wrong token positions, maps of the last image only).

        With its 50 steps of DPM-Solver++ and guidance 7.5: updates in steps 0 to 5 at least, 25 at most. It sums 8 L_ce
        + 2 L_fill over the two tokens of a concept, which is 16 and 4 times their mean here, and adds 10 L_region.
        """
        return cls(
            inject="attn2",
            rows="all",
            threshold=1.0,
            step_size=20.0,
            step_rule="raw",
            apart=0.0,
            background="scene",
            reinit="copy",
        )

    @classmethod
    def paper(cls) -> "LoraComposer":
        """The paper's weights where they differ from the code's: L = L_ce + 0.25 L_fill + 0.8 L_region.

        Its L_fill is one mean over both profiles, half of the sum here on square canvases. The step size falls
        linearly. The paper takes one update before the latent re-initialisation; the code and this do not.
        """
        return replace(cls.official(), ce_weight=1.0, fill_weight=0.125, region_weight=0.8, step_decay=1.0)

    @property
    def needs(self) -> Needs:
        """Region attention, for updates gradients, and with a latent re-initialisation start noise."""
        return Needs(region_attention=True, gradients=self.updates, start_noise=self.moves_noise)

    @property
    def updates(self) -> bool:
        """Whether latents are updated at all."""
        weights = self.ce_weight, self.fill_weight, self.region_weight
        return self.inject != "off" and min(self.step_size, self.most_updates, max(weights)) > 0

    @property
    def moves_noise(self) -> bool:
        """Whether there is a latent re-initialisation."""
        return self.inject != "off" and self.reinit != "off"

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """At least one subject needs a region, and each with a region needs a text, and words if it is moved."""
        check_regions("lora-composer", concepts)
        if prompts is None:
            return
        owners = [each.concept for each in concepts if each.concept.region is not None]
        for concept in owners:
            for prompt in prompts:
                about(concept, prompt, owners)  # raises if no text names it
            if (self.updates or self.moves_noise) and not (concept.trigger or concept.is_bystander):
                raise unmoved(concept)

    def start(self, session: Session) -> Process:
        """Encodes a text for the canvas and one for each region, and divides the grids. Styles alone are merged."""
        concepts, canvas = session.concepts, session.canvas
        if not concepts.subjects:
            return Merge().start(session)
        wanted = [concept.region for concept in concepts.concepts]
        self.check_concepts(concepts.loaded, session.prompts.texts)
        regions = Regions.of(
            wanted, canvas.image_size, canvas.latent_grid, canvas.levels, self.threshold, canvas.painted
        )
        behind = [concept for concept in concepts.concepts if concept.region is None]
        warn_unread(behind, behind, "without a region a concept acts in the background, which reads the scene's prompt")
        prompts = _own_prompts(session, regions.indices)
        composed = compose_regions(
            session, regions, region_texts(session, regions.indices, prompts, self.background), isolate=self.isolate,
            apart=self.apart, apart_side=self.apart_side, inject=self.inject, rows=self.rows,
        )  # fmt: skip
        targets = targets_of(session, regions, prompts) if self.updates or self.moves_noise else ()
        return Composing(self, session, composed, targets)


@dataclass
class Composing:
    """The process of LoRA-Composer for one call.

    On a GPU the host waits once per update, for the losses and to check that the gradient is finite, and otherwise
    never.

    Attributes:
        composed: Denoises the regions.
        targets: Regions and tokens of the losses, one for each region.
        refining: True for images that still need updates, on the CPU; None before the first step. Shape: [images].
        losses: Their losses before the last update, on the CPU. Shape: [images].
    """

    settings: LoraComposer
    session: Session
    composed: ComposedRegions
    targets: Sequence[Target]
    refining: Tensor | None = None
    losses: Tensor | None = None

    @property
    def text(self) -> Conditioning:
        """Text 0, of the canvas."""
        return self.composed.text

    @property
    def whole(self) -> PreparedPass:
        """The pass of the whole canvas."""
        return self.composed.whole

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Re-initialises the latents (section 3.5)."""
        if not self.settings.moves_noise:
            return latents
        maps = self._by_concept(self.session.denoiser.maps(latents, first, self.whole, self._request))
        words = zip(maps, self.targets, strict=True)
        scores = torch.stack([(maps * target.share[:, :, None, None]).sum(dim=1) for maps, target in words], dim=1)
        regions = [target.region > 0 for target in self.targets]
        swap = self.settings.reinit == "swap"
        return reinitialised(latents, scores, regions, 2**self.session.canvas.map_level, swap=swap)

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Updates images until their loss rises (eq. 10), then predicts with guidance."""
        if self.settings.updates and not step.second_order:
            latents = self._update(latents, step)
        return self.composed.step(latents, step)

    def _update(self, latents: Tensor, step: Step) -> Tensor:
        settings, (index, count) = self.settings, (step.index, step.count)
        if self.refining is None:
            self.refining = torch.ones(len(latents), dtype=torch.bool)
        if index > int(steps_in(settings.most_updates, count)) or not self.refining.any():
            return latents
        gradient = self.session.denoiser.gradient(latents, step, self.whole, MapLoss(self._request, self.loss))
        size = settings.step_size * (1 - 0.5 * index / max(1, count - 1)) ** settings.step_decay
        active = to_device(self.refining, latents.device)
        updated = descend(latents, gradient.direction, size, settings.step_rule, active)
        if self.losses is not None and index >= int(steps_in(settings.least_updates, count)):
            self.refining = self.refining & (gradient.losses <= self.losses)  # the update of this step has been applied
        self.losses = gradient.losses
        return updated

    def loss(self, maps: AttentionMaps) -> Tensor:
        """Eq. 9: the sum over the concepts. Shape: [images]."""
        settings, losses = self.settings, []
        for target, words in zip(self.targets, map(smooth, self._by_concept(maps)), strict=True):
            best = max(1, int(PART * len(target.inside)))
            attended = settings.ce_weight * concentration(
                words, target.gaussian if settings.gaussian else target.region, best
            )
            attended = attended + settings.fill_weight * filling(words, target.region)
            losses.append((attended * target.share).sum(dim=1))
            if maps.cells is not None:
                losses.append(
                    settings.region_weight * outside_attention(maps.cells, target.inside, target.outside, best)
                )
        return torch.stack(losses).sum(dim=0)

    @cached_property
    def _request(self) -> MapRequest:
        """The tokens of region n in text 1 + n, without the background's. Shape: [regions, images, tokens, maps]."""
        maps = max(target.words.shape[-1] for target in self.targets)
        padded = [torch.nn.functional.pad(target.words, (0, maps - target.words.shape[-1])) for target in self.targets]
        return MapRequest(torch.stack(padded), self.settings.region_weight > 0)

    def _by_concept(self, maps: AttentionMaps) -> list[Tensor]:
        """Attention to each concept's tokens, by concept. Shape: [images, maps, height, width] each."""
        return [
            of_region[..., : target.share.shape[1]].transpose(1, 2).unflatten(2, target.region.shape)
            for of_region, target in zip(maps.text, self.targets, strict=True)
        ]


PART = 0.2
"""L_ce and L_region are means over this fraction of a region's cells."""


def _own_prompts(session: Session, indices: Sequence[int]) -> list[list[str]]:
    """The text of each region, by prompt."""
    texts = session.prompts.texts
    if texts is None:
        raise ValueError("lora-composer makes a text for each region, so it needs prompts, not prompt_embeds")
    concepts = [session.concepts.concepts[i] for i in indices]
    return [[about(concept, prompt, concepts) for prompt in texts] for concept in concepts]
