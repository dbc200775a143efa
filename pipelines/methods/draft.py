"""Draft: the base model lays out the image, and every LoRA acts where its subject is; no boxes and no gradients.

A method of this project. The base model, without any LoRA, lays out a scene in the first steps.

    draft       the first steps without LoRAs, from the prompt without triggers. The mean attention of image cells to
                the class word of each subject over these steps shows where the subject is
    division    the whole canvas is divided between the subjects, half-way between their centres
    restart     from the same noise. Every LoRA acts on the cells of its subject, in one pass per step

With subjects of different classes all cells read the scene's prompt, as in `regional`. One text cannot separate two
cats, so with two subjects of one class every region reads its own text and is first denoised on a canvas of its own, as
in `lora-composer` without updates. Regions that the user gives are kept, and the rest of the canvas is divided.

`docs/methods/draft.md` measures the contribution of each part.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import grid_at
from lora_compose.attention.masks import cells_of, coarse_mask
from lora_compose.pipelines.canvas import Canvas, Step, steps_in
from lora_compose.pipelines.losses import smooth
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.process import FixedPasses, Process, constant_gates
from lora_compose.pipelines.methods.regional import Regional, shared_text
from lora_compose.pipelines.passes import MapRequest, Pass
from lora_compose.pipelines.prepared_pass import PreparedPass
from lora_compose.pipelines.regions import Regions, region_mask
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.session import Session
from lora_compose.pipelines.text.branches import branch_of
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.prompts import about

Reading = Literal["auto", "scene", "regions"]
Division = Literal["auto", "strips", "nearest"]
_CHOICES = {"reading": Reading, "division": Division}


@dataclass(frozen=True)
class Draft:
    """Every LoRA acts where the base model puts its subject; no regions are needed.

    Attributes:
        length: Fraction of the steps that is drafted, at least one step; above 1 a number of steps. The last drafted
            step stops after the last attention map.
        threshold: A cell counts for a subject's centre if the map is above this share of its maximum.
        division: "nearest" gives every cell to the subject whose centre is nearest; "strips" divides the canvas into
            columns or rows, along the axis on which subjects are further apart; "auto" uses strips where regions have
            their own texts.
        reading: The text that image cells read: "scene", the scene's prompt; "regions", a text for each region; "auto",
            a text for each region if two subjects share a class word, one has a prompt of its own, or more than two
            subjects fit side by side.
        apart: With a text for each region: the fraction of the steps, from the first, in which every region is denoised
            on a canvas of its own (`LoraComposer.apart`).
        isolate: With a text for each region: whether the cells of a region see no other region in self-attention.
        keep_regions: Whether given regions are kept; otherwise the regions of all subjects are found.
    """

    length: float = 0.12
    threshold: float = 0.3
    division: Division = "auto"
    reading: Reading = "auto"
    apart: float = 0.4
    isolate: bool = True
    keep_regions: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        if not 0 < self.length < math.inf:
            raise ValueError(f"length must be positive, not {self.length}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if not 0 <= self.apart <= 1:
            raise ValueError(f"apart must lie between 0 and 1, not {self.apart}")

    def start(self, session: Session) -> Process:
        """Encodes the texts of the draft and of the regions. A single subject is merged."""
        concepts, canvas, prompts = session.concepts, session.canvas, session.prompts
        if len(concepts.subjects) < 2:
            return Merge().start(session)
        if prompts.texts is None:
            raise ValueError("draft reads the prompt without triggers, so it needs prompts, not prompt_embeds")
        base = branch_of(None, prompts.texts, concepts.concepts, concepts.subjects)
        styles = concepts.with_styles(())
        text = prompts.encode(styles, base.prompts, None, base.names, base.mentions)
        words = prompts.find(base.prompts, base.names, base.mentions).phrase[..., list(concepts.subjects)]
        words = words / words.sum(dim=1, keepdim=True)
        words = words.repeat_interleave(canvas.images_per_prompt, dim=0).to(canvas.device)
        draft = session.denoiser.prepare(Pass(text, constant_gates(session, styles)))
        painter = (_by_regions if self._reads_regions(session) else _by_scene)(self, session)
        return Drafting(self, session, draft, words, painter)

    def _reads_regions(self, session: Session) -> bool:
        if self.reading != "auto":
            return self.reading == "regions"
        every = [session.concepts.concepts[i] for i in session.concepts.subjects]
        own = any(concept.prompt is not None or concept.negative_prompt is not None for concept in every)
        room = len(every) * _side(session.canvas) <= max(session.canvas.latent_grid)
        return own or len({_class_of(concept) for concept in every}) < len(every) or (len(every) > 2 and room)


def _side(canvas: Canvas) -> int:
    """Least side of a region's own canvas, in latent cells."""
    return math.ceil(canvas.backbone.native_side * LoraComposer.apart_side)


def _class_of(concept: Concept) -> str:
    return (concept.class_word or "").lower()


@dataclass(frozen=True)
class Painter:
    """How the image is denoised once the canvas is divided.

    Attributes:
        text: The text that callbacks see.
        divide: Divides the free cells between subjects, given their centres and a mask with 1 at free cells.
        start: Starts the process, given masks: one for all images, or one for each. Shape of the masks: [images,
            subjects, height, width] on the latent grid.
    """

    text: Conditioning
    divide: Callable[[Tensor, Tensor], Tensor]
    start: Callable[[Tensor], Sequence[Process]]


def _by_scene(settings: Draft, session: Session) -> Painter:
    """All cells read the scene's prompt, and LoRAs are gated, as in `regional`."""
    concepts, canvas, regional = session.concepts, session.canvas, Regional()
    texts = shared_text(session)

    def start(masks: Tensor) -> Sequence[Process]:
        every = torch.ones(len(masks), len(concepts.loaded), *masks.shape[2:])
        every[:, list(concepts.subjects)] = masks
        by_level = {}
        for level in canvas.levels:
            coarse = torch.stack([coarse_mask(mask, level) for mask in every.flatten(0, 1)])
            by_level[level] = coarse.flatten(1).unflatten(0, every.shape[:2]).transpose(1, 2).to(canvas.device)
        everywhere = [concept.is_style for concept in concepts.concepts]
        return [FixedPasses(session, [[(regional.gated(session, texts, by_level, everywhere), 1.0)]])]

    return Painter(texts.text, strips if settings.division == "strips" else nearest, start)


def _by_regions(settings: Draft, session: Session) -> Painter:
    """Every region reads a text of its own, as in `lora-composer` without updates."""
    owners, composer = (
        session.concepts.subjects,
        LoraComposer(step_size=0, apart=settings.apart, isolate=settings.isolate, threshold=0.5),
    )
    subjects = [session.concepts.concepts[i] for i in owners]
    prompts = [[about(subject, prompt, subjects) for prompt in session.prompts.texts or ()] for subject in subjects]
    texts = composer.texts(session, owners, prompts)

    def start(masks: Tensor) -> Sequence[Process]:
        every = [Regions.of_masks(owners, image, session.canvas.levels, composer.threshold) for image in masks]
        return [
            composer.composing(session, regions, texts.of_image(image), image=image)
            for image, regions in enumerate(every)
        ]

    # Borders at which the canvases of the first steps do not overlap.
    block, side = 2 ** max(session.canvas.levels), _side(session.canvas)
    blocks = partial(strips, block=block, side=side) if settings.apart > 0 else strips
    return Painter(texts.background, nearest if settings.division == "nearest" else blocks, start)


@dataclass
class Drafting:
    """The process of a draft for one call.

    Attributes:
        settings: The settings.
        session: The call.
        draft: The pass of the draft.
        words: Weight of every token in the map of each subject. Shape: [images, tokens, subjects].
        painter: How the image is denoised.
        masks: The masks of all concepts on the map grid. Shape: [images, concepts, height, width], bool.
        processes: The processes that denoise the images.
    """

    settings: Draft
    session: Session
    draft: PreparedPass
    words: Tensor
    painter: Painter
    masks: Tensor | None = None
    processes: Sequence[Process] = ()

    @property
    def text(self) -> Conditioning:
        """The text that callbacks see."""
        return self.painter.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Drafts the image and divides the canvas; the latents stay as they are."""
        canvas, concepts = self.session.canvas, self.session.concepts
        subjects = [concepts.concepts[i] for i in concepts.subjects]
        given = [_given(subject if self.settings.keep_regions else None, canvas) for subject in subjects]
        map_grid = grid_at(canvas.latent_grid, canvas.map_level)
        # With a given region for each subject there is nothing to find.
        nothing = all(region.any() for region in given)
        maps = torch.zeros(canvas.images, len(given), *map_grid) if nothing else self._maps(latents, first).cpu()
        masks = torch.stack(
            [divided(image, subjects, given, self.painter.divide, self.settings.threshold) for image in maps]
        )
        self.processes = self.painter.start(masks)
        self.masks = torch.ones(len(maps), len(concepts.loaded), *maps.shape[2:], dtype=torch.bool)
        self.masks[:, list(concepts.subjects)] = F.interpolate(masks, maps.shape[2:], mode="area") >= 0.5
        return latents

    def _maps(self, latents: Tensor, first: Step) -> Tensor:
        """The mean attention to each subject over the draft. Shape: [images, subjects, height, width]."""
        session, found = self.session, []
        steps = max(1, min(math.ceil(steps_in(self.settings.length, first.count)), first.count))
        rows = torch.cat([torch.zeros_like(self.words), self.words]) if first.guided else self.words
        with session.denoiser.sampler.ahead() as sampler:
            denoiser = session.denoiser.ahead(sampler)
            every = [sampler.schedule.step(index, first.cfg_scale) for index in range(steps)]
            for step in every[:-1]:
                prediction = denoiser.predict(latents, step, self.draft, MapRequest(rows))
                found.append(prediction.maps)
                latents = sampler.step(session.guider.combine(prediction, step), step.t, latents)
            found.append(denoiser.maps(latents, every[-1], self.draft, MapRequest(self.words)))
        mean = torch.stack([maps.text[-len(self.words) :] for maps in found]).mean(dim=0)
        return mean.transpose(1, 2).unflatten(2, grid_at(session.canvas.latent_grid, session.canvas.map_level))

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One step of the process of all images, or of the process of each."""
        assert self.masks is not None, "prepare comes before the first step"
        self.session.log.keep_masks(step.index, self.masks)
        if len(self.processes) == 1:
            return self.processes[0].step(latents, step)
        outputs = [process.step(latents[i : i + 1], step)[1] for i, process in enumerate(self.processes)]
        return latents, torch.cat(outputs)


def _given(subject: Concept | None, canvas: Canvas) -> Tensor:
    """The given region; empty if there is none. Shape: [height, width] of the latents, bool."""
    if subject is None or subject.region is None:
        return torch.zeros(canvas.latent_grid, dtype=torch.bool)
    return cells_of(region_mask(subject.region, canvas.image_size, canvas.latent_grid, sharp=True), 0.5)


def divided(
    maps: Tensor,
    subjects: Sequence[Concept],
    given: Sequence[Tensor],
    divide: Callable[[Tensor, Tensor], Tensor],
    threshold: float,
) -> Tensor:
    """Divides the canvas of one image between its subjects.

    Args:
        maps: Attention to each subject. Shape: [subjects, map grid height, width].
        subjects: The subjects.
        given: The given region of each subject on the latent grid; empty if there is none. Shape: [height, width] each.
        divide: Divides the free cells, as in `Painter`.
        threshold: As for `centres_of`.

    Returns:
        1 in the region of a subject; a cell is in one region, or in several given ones. Shape: [subjects, height,
        width], fp32.

    Raises:
        ValueError: If the given regions leave no cell for the other subjects.
    """
    masks = torch.stack(list(given)).float()
    free = 1 - masks.amax(dim=0)
    found = [n for n, region in enumerate(given) if not region.any()]
    if not found:
        return masks
    if not free.any():
        names = ", ".join(subjects[n].name for n in found)
        raise ValueError(f"the given regions cover the whole canvas and leave no room for {names}")
    here = F.adaptive_avg_pool2d(free[None], (maps.shape[1], maps.shape[2]))[0]
    centres = centres_of(smooth(maps[found]) * here, [_class_of(subjects[n]) for n in found], threshold)
    masks[found] = divide(centres, free)
    return masks


def centres_of(maps: Tensor, classes: Sequence[str], threshold: float) -> Tensor:
    """The centre of each subject (y, x), as fractions of the canvas. Shape: [subjects, 2].

    A subject's cells are those whose attention to it is above a share of its maximum, and higher than to any other
    subject, each relative to its maximum. Subjects of one class share their cells, which are clustered; clusters go
    from left to right in the order of the prompt.

    Args:
        maps: Attention to each subject. Shape: [subjects, height, width].
        classes: Class word of each subject.
        threshold: The share.
    """
    height, width = maps.shape[1:]
    heights = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    down, across = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    cells = torch.stack([down, across], dim=-1)
    centres = torch.zeros(len(maps), 2)
    words = list(dict.fromkeys(classes))
    of_class = torch.stack([heights[[n for n, one in enumerate(classes) if one == word]].amax(dim=0) for word in words])
    owner = of_class.argmax(dim=0)
    for k, word in enumerate(words):
        mine = (owner == k) & (of_class[k] > threshold)
        if not mine.any():
            mine = of_class[k] == of_class[k].max()
        members = [n for n, one in enumerate(classes) if one == word]
        centres[members] = clusters(cells[mine], of_class[k][mine], len(members))
    return centres


def clusters(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """The centres of clusters of weighted points by k-means, from left to right. Shape: [count, 2].

    The first centre is the heaviest point, each further one the point with the largest weight times squared distance.
    """
    centres = points[weights.argmax()][None]
    while len(centres) < count:
        away = torch.cdist(points, centres).amin(dim=1).square() * weights
        centres = torch.cat([centres, points[away.argmax()][None]])
    for _ in range(10):
        mine = F.one_hot(torch.cdist(points, centres).argmin(dim=1), count) * weights[:, None]
        total = mine.sum(dim=0)
        moved = mine.T @ points / total[:, None].clamp(min=1e-20)
        centres = torch.where(total[:, None] > 0, moved, centres)
    return centres[centres[:, 1].argsort(stable=True)]


def strips(centres: Tensor, free: Tensor, *, block: int = 1, side: int = 0) -> Tensor:
    """Columns or rows of free cells, one for each subject, with borders half-way between their centres.

    The canvas is divided along the axis on which subjects are further apart. No strip is narrower than 0.7 of an equal
    part.

    Args:
        centres: (y, x) as fractions of the canvas. Shape: [subjects, 2].
        free: 1 at free cells. Shape: [height, width].
        block: Borders lie on multiples of this number of cells, if every subject gets a block.
        side: Least width of a strip in cells, if there is room.

    Returns:
        Shape: [subjects, height, width].
    """
    count, sides = len(centres), torch.tensor(free.shape)
    spread = (centres.amax(dim=0) - centres.amin(dim=0)) * sides
    axis = 1 if spread[1] >= 0.8 * spread[0] else 0
    length = free.shape[axis]
    block = block if length // count >= block else 1
    least = min(math.ceil(max(0.7 * length / count, side) / block) * block, length // count // block * block)
    order = centres[:, axis].argsort(stable=True).tolist()
    borders = [0]
    for j, (one, other) in enumerate(pairwise(order), start=1):
        middle = float(centres[one, axis] + centres[other, axis]) / 2 * length
        latest = (length - least * (count - j)) // block * block
        borders.append(min(max(round(middle / block) * block, borders[-1] + least), latest))
    masks = torch.zeros(count, *free.shape)
    for n, (start, stop) in zip(order, pairwise([*borders, length]), strict=True):
        masks[n].narrow(axis, start, stop - start).fill_(1)
    return masks * free


def nearest(centres: Tensor, free: Tensor) -> Tensor:
    """Every free cell for the subject whose centre is nearest. Args and shape: as for `strips`."""
    sides = torch.tensor(free.shape)
    cells = torch.stack(torch.meshgrid(*(torch.arange(int(side)) + 0.5 for side in sides), indexing="ij"), dim=-1)
    owner = torch.cdist(cells.flatten(0, 1), centres * sides).argmin(dim=1).unflatten(0, free.shape)
    return F.one_hot(owner, len(centres)).movedim(-1, 0) * free
