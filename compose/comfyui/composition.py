"""What is to act where in a model: concepts, and the gates that a method makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from lora_compose.attention import Gates, Grid, JointRegions, Lora, Partition, RegionAttention, TextBias, grid_at
from lora_compose.attention.masks import Box, box_mask, cells_of, resize_mask
from lora_compose.attention.regions import queries_of
from lora_compose.compose.comfyui.families import Family
from lora_compose.pipelines.scene.division import divided, nearest, strips
from lora_compose.pipelines.scene.scene import Concept

UNIT = 1000
"""Boxes are in thousandths of the image, whose size is not known before it is sampled."""
HALF = 0.5
"""A cell reads the text of a region that covers at least this share of it."""
THRESHOLD = 0.3
"""The share of a map's maximum from which a cell counts for the centre of a subject, as in our pipelines."""
Region = Box | Tensor
"""A box, or a mask with values in 0..1. Shape: [height, width]."""


@dataclass(frozen=True, eq=False)
class Draft:
    """The first steps, without subjects: they show where the base model puts these; then sampling starts again.

    Attributes:
        conditioning: ComfyUI's, of the text without triggers.
        words: Weight of every token of it in the map of each subject. Shape: [tokens, subjects].
        subjects: As our pipelines know them, with the index of each among the concepts.
        strips: Whether the image is divided into columns or rows; otherwise every cell is of the nearest subject.
    """

    conditioning: Sequence[Sequence[Any]]
    words: Tensor
    subjects: Mapping[int, Concept]
    strips: bool

    def divide(self, maps: Tensor, regions: Sequence[Region | None], grid: Grid) -> list[Region | None]:
        """The regions of all concepts in one image.

        Args:
            maps: Attention to each subject. Shape: [subjects, height, width] of the map grid.
            regions: Those that are given stay as they are.
            grid: Height and width of the latents.
        """
        given = [regions[i] for i in self.subjects]
        known = [torch.zeros(grid) if one is None else cells_of(on_grid(one, grid), HALF) for one in given]
        divide = strips if self.strips else nearest
        masks = iter(divided(maps, [*self.subjects.values()], known, divide, THRESHOLD))
        found = {i: mask if regions[i] is None else regions[i] for i, mask in zip(self.subjects, masks, strict=True)}
        return [found.get(i, region) for i, region in enumerate(regions)]


@dataclass(frozen=True, eq=False)
class Composition:
    """Concepts that act together.

    Attributes:
        loras: Factors of each concept by ComfyUI's names of layers.
        weights: One for each concept.
        regions: Where each acts on the image; None is everywhere, or is found by the draft.
        words: On which tokens of the text each acts. Shape: [tokens, concepts]; 1 token stands for all.
        text_of_others: Whether concepts also act on the text of other conditionings, e.g. the negative one.
        image_of_others: Whether they also act on the image where other conditionings are predicted.
        lengths: Tokens of the text of the image, and of those of regions, which follow it; None if all read one text.
        owners: Index of the concept that each regional prompt describes.
        isolate: Whether cells of a region see no other region; with texts of regions.
        phrases: 1 at the words of each concept in the text, to which a bias draws the cells of its region. Shape:
            [tokens, concepts].
        draft: Finds regions.
        mark: Stands for this composition in conditionings.
    """

    loras: Sequence[Lora]
    weights: Tensor
    regions: Sequence[Region | None]
    words: Tensor
    text_of_others: bool = False
    image_of_others: bool = False
    lengths: Sequence[int] | None = None
    owners: Sequence[int] = ()
    isolate: bool = False
    phrases: Tensor | None = None
    draft: Draft | None = None
    mark: str = field(init=False, default_factory=lambda: uuid4().hex)

    def filled(self, tokens: int, *, behind: bool) -> "Composition":
        """As it is where ComfyUI fills the text with zeros, up to so many tokens.

        Args:
            behind: Whether they follow the text; otherwise they are in front of it, and belong to that of the image.
        """
        plan = replace(self, phrases=None if self.phrases is None else filled(self.phrases, tokens, behind=behind))
        missing = tokens - len(self.words)
        if missing <= 0 or len(self.words) == 1:
            return plan
        if self.lengths is None or behind:
            return replace(plan, words=filled(self.words, tokens, behind=behind))
        words = torch.cat([self.words[:1].repeat(missing, 1), self.words])
        return replace(plan, words=words, lengths=[self.lengths[0] + missing, *self.lengths[1:]])

    def gates(self, family: Family, ours: Sequence[bool], grid: Grid, tokens: int, found: Sequence[Any] = ()) -> Gates:
        """The gates of one pass.

        Args:
            family: What is known of the model.
            ours: By row, whether it is predicted for our conditioning.
            grid: Height and width of the latents.
            tokens: Tokens of the text in each row; ComfyUI repeats shorter texts to the length of others.
            found: The regions of all concepts by image, where a draft has found some.
        """
        images = found or [self.regions]
        words = self.words if any(ours) else self.words[:1]  # a pass of others has a text of any length
        mine = torch.tensor(ours, dtype=torch.float32)[:, None]
        image = torch.ones_like(mine) if self.image_of_others else mine
        text = torch.ones_like(mine) if self.text_of_others else mine
        everywhere = torch.tensor([float(region is None) for region in images[0]])
        levels = {site.level for site in family.sites.values() if "image" in site.parts}
        read = None
        if self.lengths is not None and family.joint is None:
            of_text = gates_by_prompt(everywhere, self.owners)
            inside = {level: self.inside(images[0], grid_at(grid, level)) for level in levels}
            read = {level: image[:, None] * of_text[queries_of(one)[0]] for level, one in inside.items()}
        return Gates(
            text=text[:, None] * words.repeat(tokens // len(words), 1),
            image={level: image[:, None] * by_row(images, grid_at(grid, level), len(ours)) for level in levels},
            row=image * torch.ones(len(self.loras)),
            latent_grid=grid,
            read=read,
            # A transformer's modulation scales all cells alike, so a region would leak into the others.
            modulation=image * everywhere,
        ).times(self.weights)

    def inside(self, regions: Sequence[Region | None], grid: Grid) -> Tensor:
        """True where a cell reads the text of a region. Shape: [cells, texts of regions]."""
        masks = [on_grid(region, grid) for i in self.owners if (region := regions[i]) is not None]
        return torch.stack([cells_of(mask, HALF).flatten() for mask in masks], dim=1)

    def regions_of_pass(
        self, family: Family, ours: int, grid: Grid, regions: Sequence[Region | None], device: torch.device
    ) -> RegionAttention | JointRegions | None:
        """Region attention of the rows with concepts; None if all cells attend to one prompt."""
        if self.lengths is None:
            return None
        if (joint := family.joint) is not None:
            inside = self.inside(regions, grid_at(grid, joint.level))
            return JointRegions.of(joint, inside, self.lengths, [False] * ours, isolate=self.isolate, device=device)
        inside = {
            level: self.inside(regions, grid_at(grid, level)) for level in {s.level for s in family.attention.values()}
        }
        partitions = {level: Partition.of(one, device) for level, one in inside.items()}
        return RegionAttention(partitions, inject=True, isolate=self.isolate)

    def bias(
        self, family: Family, ours: Sequence[bool], grid: Grid, tokens: int, found: Sequence[Any] = ()
    ) -> TextBias | None:
        """What is added to the scores of cross-attention: 1 between a region and its words, -1 for those of others.

        Args: as for `gates`.
        """
        if self.phrases is None or not any(ours):
            return None
        own, acting = self.phrases.repeat(tokens // len(self.phrases), 1), torch.tensor(ours, dtype=torch.float32)
        drawn = own - (own.sum(dim=1, keepdim=True) - own)
        subjects = self.phrases.any(dim=0)
        levels = {site.level for site in family.attention.values() if site.reads_text}
        shares = {level: by_row(found or [self.regions], grid_at(grid, level), len(ours)) for level in levels}
        cells = {level: (share * subjects).expand(len(ours), -1, -1) for level, share in shares.items()}
        return TextBias(cells, acting[:, None, None] * drawn)


def filled(words: Tensor, tokens: int, *, behind: bool) -> Tensor:
    """Zeros behind the tokens of a text, or in front of them. Shape: [tokens, concepts]."""
    missing = max(0, tokens - len(words))
    return torch.nn.functional.pad(words, (0, 0, 0, missing) if behind else (0, 0, missing, 0))


def gates_by_prompt(everywhere: Tensor, owners: Sequence[int]) -> Tensor:
    """Gates by prompt: 1 on a concept's own regional prompt, without a region on all. Shape: [texts, concepts]."""
    return torch.stack([everywhere, *(everywhere + torch.eye(len(everywhere))[list(owners)])])


def by_row(images: Sequence[Sequence[Region | None]], grid: Grid, rows: int) -> Tensor:
    """Where each concept acts. Shape: [rows or 1, cells or 1, concepts]; images are repeated for each conditioning."""
    if all(region is None for regions in images for region in regions):
        return torch.ones(1, 1, len(images[0]))
    each = [torch.stack([on_grid(region, grid).flatten() for region in regions], dim=-1) for regions in images]
    return torch.stack(each * (rows // len(each) if len(each) > 1 else 1))


def on_grid(region: Region | None, grid: Grid) -> Tensor:
    """How much of every cell is in a region. Shape: [height, width]."""
    if region is None:
        return torch.ones(grid)
    return resize_mask(region, grid) if isinstance(region, Tensor) else box_mask(region, (UNIT, UNIT), grid)
