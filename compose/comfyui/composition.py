"""What is to act where in a model: concepts, and the gates that a method makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from lora_compose.attention import (
    Gates,
    Grid,
    JointRegions,
    Lora,
    NormRegions,
    Partition,
    RegionAttention,
    Site,
    TextBias,
    grid_at,
)
from lora_compose.attention.device import row_index
from lora_compose.attention.joint_regions import Attend, SiteParts
from lora_compose.attention.masks import Box, box_mask, cells_of, resize_mask
from lora_compose.attention.regions import queries_of
from lora_compose.compose.comfyui.families import Family
from lora_compose.pipelines.scene.division import THRESHOLD, divided, nearest, strips
from lora_compose.pipelines.scene.regions import HALF
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.strength import WeightSchedule

UNIT = 1000
"""Boxes are in thousandths of the image, whose size is not known before it is sampled."""
Conditioning = Sequence[Sequence[Any]]
"""ComfyUI's: texts, each with options."""
Region = Box | Tensor
"""A box, or a mask with values in 0..1. Shape: [height, width]."""
RegionsByImage = Sequence[Sequence[Region | None]]
"""The regions of all concepts, of each image if a draft has found some; None is everywhere."""


@dataclass(frozen=True, eq=False)
class DraftSteps:
    """The first steps, without subjects: they show where the base model puts these; then sampling starts again.

    Attributes:
        conditioning: ComfyUI's, of the text without triggers.
        words: Weight of every token of it in the map of each concept that is looked for. Shape: [tokens, concepts].
        subjects: As our pipelines know them, with the index of each among the concepts.
        strips: Whether the image is divided into columns or rows; otherwise every cell is of the nearest subject.
    """

    conditioning: Conditioning
    words: Tensor
    subjects: Mapping[int, Concept]
    strips: bool

    def divide(self, maps: Tensor, regions: Sequence[Region | None], grid: Grid) -> list[Region | None]:
        """The regions of all concepts in one image, on a grid of this height and width; given ones stay as they are.

        `maps` is the attention to each concept. Shape: [concepts, height, width] of the map grid.
        """
        given, of_subjects = [regions[i] for i in self.subjects], maps[[*self.subjects]]
        known = [torch.zeros(grid) if region is None else cells_of(on_grid(region, grid), HALF) for region in given]
        divide = strips if self.strips else nearest
        masks = divided(of_subjects, [*self.subjects.values()], known, divide, THRESHOLD)
        divisions = dict(zip(self.subjects, masks, strict=True))
        return [divisions.get(i) if region is None else region for i, region in enumerate(regions)]


@dataclass(frozen=True, eq=False)
class Found:
    """What a draft has found. Shape of both: [images, concepts, height, width].

    Attributes:
        maps: Attention to each concept; 0 for those that it has not looked for.
        cells: How much of each cell is in the region of each concept.
    """

    maps: Tensor
    cells: Tensor


@dataclass(frozen=True, eq=False)
class ComposedConcepts:
    """Concepts that act together.

    Attributes:
        loras: Factors of each concept by ComfyUI's names of layers.
        weights: The weight of each concept over the steps.
        regions: Where each acts on the image; None is everywhere, or is found by the draft.
        words: On which tokens of the text each acts, or on which of several texts. Shape: [tokens or texts, concepts];
            1 token stands for all.
        text_of_others: Whether concepts also act on the text of other conditionings, e.g. the negative one.
        image_of_others: Whether they also act on the image where other conditionings are predicted.
        tokens: Tokens of the conditioning, which must not be joined to another one; None if it may be.
        texts: ComfyUI's conditionings of the text of the image and of those of regions; empty if all read one text.
        whole: The conditioning, if it must not be changed, since these texts are read in its place.
        owners: Index of the concept of each region; with texts of regions, in their order.
        isolate: The part of the steps, from the first, in which cells of a region see no other region; 0 on UNets and
            Anima without texts of regions.
        kept: 1 at the words that a concept leaves as they are, since they are those of others; None if it leaves none.
            Shape: [tokens, concepts].
        phrases: 1 at the words of each concept in the text, to which a bias draws the cells of its region. Shape:
            [tokens, concepts].
        draft: Finds regions.
        mark: Stands for this composition in conditionings.
    """

    loras: Sequence[Lora]
    weights: Sequence[WeightSchedule]
    regions: Sequence[Region | None]
    words: Tensor
    text_of_others: bool = False
    image_of_others: bool = False
    tokens: int | None = None
    texts: Sequence[Conditioning] = ()
    whole: Conditioning | None = None
    owners: Sequence[int] = ()
    isolate: float = 0.0
    kept: Tensor | None = None
    phrases: Tensor | None = None
    draft: DraftSteps | None = None
    mark: str = field(init=False, default_factory=lambda: uuid4().hex)

    def weights_at(self, step: int, steps: int) -> tuple[float, ...]:
        """The weights in a step out of so many."""
        return tuple(weight.at(step, steps) for weight in self.weights)

    def drafted(self, draft: DraftSteps) -> "ComposedConcepts":
        """As it is while a draft is made: concepts that are no subjects act everywhere, and all read its text."""
        off, words = WeightSchedule.of(0.0), torch.ones(1, len(self.loras))
        weights = [off if i in draft.subjects else weight for i, weight in enumerate(self.weights)]
        texts = [draft.conditioning]
        return replace(self, weights=weights, words=words, texts=texts, isolate=0.0, kept=None, phrases=None)


@dataclass(frozen=True, eq=False)
class JointRegionsByImage(JointRegions):
    """Region attention where images have regions of their own; rows are of the images in turn.

    Attributes:
        images: That of the rows of each image.
    """

    images: Sequence[JointRegions] = ()

    def attend(
        self, attend: Attend, parts: SiteParts, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """As `JointRegions.attend`; a mask is for all rows."""
        out = torch.empty_like(query)
        for image, regions in enumerate(self.images):
            rows = slice(image, None, len(self.images))
            out[rows] = regions.attend(attend, parts, query[rows], key[rows], value[rows], mask)
        return out


@dataclass(frozen=True, eq=False)
class Passes:
    """A composition on the grids of a model, for the passes of a sampling or of its draft.

    Attributes:
        shares: How much of each cell is in the region of each concept, by level. Shape: [images, cells, concepts]; 1
            image stands for all, and 1 cell where no concept has a region.
        everywhere: True for concepts without a region.
        lengths: Tokens of each text, where there are several.
    """

    composition: ComposedConcepts
    family: Family
    shares: Mapping[int, Tensor]
    everywhere: Sequence[bool]
    lengths: Sequence[int]

    @classmethod
    def of(
        cls, composition: ComposedConcepts, family: Family, grid: Grid, images: RegionsByImage, lengths: Sequence[int]
    ) -> "Passes":
        """A composition in some images, whose latents have a grid."""
        everywhere = [region is None for region in images[0]]
        levels = {site.level for site in family.sites.values() if "image" in site.parts}
        grids: dict[int, Grid] = {level: (1, 1) if all(everywhere) else grid_at(grid, level) for level in levels}
        shares = {
            level: torch.stack([on_grids(regions, here).flatten(1).t() for regions in images])
            for level, here in grids.items()
        }
        return cls(composition, family, shares, everywhere, lengths)


@dataclass(frozen=True, eq=False)
class Acting:
    """What acts where in one pass.

    Attributes:
        ours: True for rows that are predicted for our conditioning. Shape: [rows].
        grid: Height and width of the latents.
        tokens: Tokens of the text in each row.
        weights: The concepts' weights in the step (`ComposedConcepts.weights_at`).
        isolated: Whether cells of a region see no other region in the step.
    """

    passes: Passes
    ours: Tensor
    grid: Grid
    tokens: int
    weights: tuple[float, ...]
    isolated: bool = False

    @property
    def gates(self) -> Gates:
        """The gates of all layers; 1 row stands for all where concepts act on every row."""
        composition, mine, shares = self.passes.composition, self.ours.float()[:, None], self._shares
        image = torch.ones(1, 1) if composition.image_of_others else mine
        text = torch.ones(1, 1) if composition.text_of_others else mine
        read = None
        if self._several and self.passes.family.joint is None:
            queries = {level: queries_of(self._inside(level))[0] for level in shares}
            read = {level: image[:, None] * composition.words[texts] for level, texts in queries.items()}
        return Gates(
            text=text[:, None] * self._words,
            image={level: image[:, None] * share for level, share in shares.items()},
            row=image * torch.ones(len(composition.loras)),
            latent_grid=self.grid,
            read=read,
            # A transformer's modulation scales all cells alike, so a region would leak into the others.
            modulation=image * torch.tensor(self.passes.everywhere).float(),
        ).times(torch.tensor(self.weights))

    def regions(self, device: torch.device) -> tuple[RegionAttention | None, JointRegions | None]:
        """Region attention, where text is apart or in one sequence with the image; None if all see the same."""
        isolate, family, lengths = self.isolated, self.passes.family, self.passes.lengths
        if not (lengths or isolate) or not self.ours.any():
            return None, None
        if (joint := family.joint) is not None:
            return None, self._joint_regions(joint, device)
        levels = {site.level for site in family.attention.values()}
        partitions = {level: Partition.of(self._inside(level), device) for level in levels}
        others, mine = (row_index(rows.nonzero()[:, 0].tolist(), device) for rows in (~self.ours, self.ours))
        apart = None if others is None or mine is None else (others, mine)
        return RegionAttention(partitions, True, isolate, lengths, apart), None

    @property
    def bias(self) -> TextBias | None:
        """What is added to scores between image and text: 1 for a region and its words, -1 for those of others.

        Where these are one sequence, in the steps in which regions are isolated.
        """
        phrases, family, shares = self.passes.composition.phrases, self.passes.family, self._shares
        if phrases is None or not self.ours.any() or (family.joint is not None and not self.isolated):
            return None
        levels = {site.level for site in family.attention.values() if site.reads_text or site.joint}
        cells = {level: shares[level].expand(len(self.ours), -1, -1) * phrases.any(dim=0) for level in levels}
        tokens = self.ours.float()[:, None, None] * over(phrases, self.tokens, family)
        return TextBias.between(cells, tokens, 1, -1)

    @property
    def norm_regions(self) -> NormRegions | None:
        """The regions of group normalisation; None where no concept has one."""
        weights = zip(self.passes.composition.weights, self.passes.everywhere, strict=True)
        here = [i for i, (weight, everywhere) in enumerate(weights) if not everywhere and weight.constant != 0]
        return NormRegions.by_level(self.passes.shares, self.grid, here) if here else None

    def _joint_regions(self, joint: Site, device: torch.device) -> JointRegions:
        """Texts of regions, or one that all regions read; of each image where these have regions of their own."""
        lengths, others = self.passes.lengths or [self.tokens], (~self.ours).tolist()
        images = len(self.passes.shares[joint.level])

        def of(image: int) -> JointRegions:
            inside, rows = self._inside(joint.level, image), others[image::images]
            regions = JointRegions.of(joint, inside, lengths, rows, isolate=self.isolated, device=device)
            return replace(regions, base=None)  # the text of others is their own

        first, *more = map(of, range(images))
        if not more:
            return first
        return JointRegionsByImage(
            first.groups, tuple(others), positions=first.positions, reach=first.reach, images=(first, *more)
        )

    @property
    def _several(self) -> bool:
        """Whether rows of the pass read several texts."""
        return bool(self.passes.lengths) and bool(self.ours.any())

    @property
    def _words(self) -> Tensor:
        """Where concepts act in the text. Shape: [tokens or 1, concepts]."""
        composition, lengths = self.passes.composition, self.passes.lengths
        words = composition.words
        if not self.ours.any():  # a text of others has any length
            return words[:1]
        if composition.kept is not None:
            return words * (1 - over(composition.kept, self.tokens, self.passes.family))
        if len(words) == 1:
            return words
        if lengths:
            words = words.repeat_interleave(torch.tensor(lengths), dim=0)
        return over(words, self.tokens, self.passes.family)

    def _inside(self, level: int, image: int = 0) -> Tensor:
        """True where a cell is in a region. Shape: [cells, regions]."""
        return cells_of(self.passes.shares[level][image][:, [*self.passes.composition.owners]], HALF)

    @property
    def _shares(self) -> Mapping[int, Tensor]:
        """Shares by row; images are repeated by conditioning. Shape: [rows or 1, cells or 1, concepts] each."""
        shares = self.passes.shares
        times = {level: len(self.ours) // len(share) if len(share) > 1 else 1 for level, share in shares.items()}
        return {level: share.repeat(times[level], 1, 1) for level, share in shares.items()}


def over(words: Tensor, tokens: int, family: Family) -> Tensor:
    """Words of a text where ComfyUI fills it up with zeros, or repeats it, to a length. Shape: [tokens, concepts]."""
    missing = max(0, tokens - len(words))
    if family.zeros is None:
        return words.repeat(tokens // len(words), 1)
    return torch.nn.functional.pad(words, (0, 0, missing, 0) if family.zeros == "before" else (0, 0, 0, missing))


def on_grid(region: Region | None, grid: Grid) -> Tensor:
    """How much of every cell is in a region. Shape: [height, width]."""
    if region is None:
        return torch.ones(grid)
    return resize_mask(region, grid) if isinstance(region, Tensor) else box_mask(region, (UNIT, UNIT), grid)


def on_grids(regions: Sequence[Region | None], grid: Grid) -> Tensor:
    """How much of every cell is in each region. Shape: [regions, height, width]."""
    return torch.stack([on_grid(region, grid) for region in regions])
