"""Draft: the base model lays out the image, and every LoRA acts where its subject is; no boxes and no gradients.

A method of this project. The base model, without any LoRA, lays out a scene in the first steps.

    draft       the first steps without LoRAs, from the prompt without triggers. The attention of image cells to the
                class word of each subject shows where the subject is
    division    the whole canvas is divided between the subjects, half-way between their centres
    restart     from the same noise. Every LoRA acts on the cells of its subject, in one pass per step

All cells read the scene's prompt, as in `regional`, and a bias draws the cells of a region to the words of its
subject, as in `freefuse`. Attention to a class word cannot tell two cats apart, so their cells are clustered, from left
to right. Where text and image are one sequence, a LoRA changes no words of other subjects, and regions do not see each
other at first. A concept with a prompt of its own gets a text for its region; on UNets also a plain cat beside the cat
of a LoRA, and three or more on a wide canvas. These regions are denoised apart at first, as in `lora-composer` without
updates. Regions that the user gives are kept, and the rest of the canvas is divided.

`docs/methods/draft.md` measures the contribution of each part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import NORM_APART, grid_at
from lora_compose.attention.masks import cells_of, coarse_mask
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.passes import MapRequest, Pass
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import (
    ImageByImage,
    InTurn,
    Needs,
    Process,
    Settings,
    check_choices,
    check_limit,
    constant_gates,
)
from lora_compose.pipelines.denoising.sampler import renews_noise
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.denoising.together import Together, each_subject, limited, of_one_text, overlapping
from lora_compose.pipelines.methods.composed_regions import APART_SIDE, compose_regions
from lora_compose.pipelines.methods.drafted import drafted, reordered
from lora_compose.pipelines.methods.gated_pass import (
    ChosenTokenMask,
    gated_pass,
    isolated_at_first,
    token_mask_in,
    with_region_norm,
)
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.region_bias import region_bias
from lora_compose.pipelines.methods.region_texts import (
    GatedText,
    SegmentedTexts,
    one_segment,
    region_texts,
    segment_texts,
    shared_text,
)
from lora_compose.pipelines.methods.regional import Regional
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.scene.division import (
    APART_JOINT,
    LENGTH,
    LENGTH_JOINT,
    THRESHOLD,
    divided,
    nearest,
    spacing,
    strips,
)
from lora_compose.pipelines.scene.regions import HALF, Regions, region_mask
from lora_compose.pipelines.scene.scene import Concept, beside_its_class
from lora_compose.pipelines.text.branches import branch_of
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.missing import Described, missing_words
from lora_compose.pipelines.text.prompts import about

ReadingMode = Literal["auto", "scene", "regions", "subjects"]
Division = Literal["auto", "strips", "nearest"]
BackgroundMode = Literal["auto", "surroundings", "scene"]
RestartMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Draft(Settings):
    """Every LoRA acts where the base model puts its subject; no regions are needed.

    Attributes:
        length: Fraction of the steps that is drafted, at least one step; above 1 a number of steps. The last drafted
            step stops after the last attention map. None is 0.12, or 0.16 where text and image are one sequence: there
            the first steps show no subjects yet, and maps are those of the last drafted step alone.
        layers: The attention layers whose maps are taken, by the first parts of their names, such as
            "single_transformer_blocks" of FLUX.1. None leaves it to the model (`Backbone.map_layers`).
        threshold: A cell counts for a subject's centre if the map is above this share of its maximum.
        division: "nearest" gives every cell to the subject whose centre is nearest; "strips" divides the canvas into
            columns or rows, along the axis on which subjects are further apart; "auto" uses strips on UNets and Anima
            where regions have their own texts.
        reading: The text that image cells read: "scene", the scene's prompt; "regions", a text for each region, about
            its subject in the scene; "subjects", about its subject alone; "auto", a text for each region if a subject
            has a prompt of its own, and on UNets and Anima also if one has a negative prompt, a bystander shares the
            class word of another, or more than two fit side by side.
        background: With texts of regions: what cells outside of regions read on UNets and Anima, and what all cells
            read besides on other transformers: the "scene" without triggers, or its "surroundings" without the
            subjects; "auto", the surroundings on UNets and Anima, and the scene on others.
        apart: With texts of their own, the part of the steps, from the first, in which every region is denoised on a
            canvas of its own (`LoraComposer.apart`); transformers denoise no region apart.
        isolate: The part of the steps, from the first, in which the cells of a region see no other region in
            self-attention; on UNets and Anima with texts of their own. None is 1 there, and 0.5 on other transformers,
            whose images fall apart if it lasts.
        bias: With the scene's prompt: added to the attention scores between the cells of a region and the words of its
            subject, and subtracted for the words of other subjects; where text and image are one sequence, in both
            directions.
        bias_steps: The part of the steps, from the first, with the bias. None is all in cross-attention, and 0.5 where
            text and image are one sequence.
        norm_apart: With the scene's prompt, as in `Regional`.
        keep_regions: Whether given regions are kept; otherwise the regions of all subjects are found.
        token_mask: As in `Regional`; on UNets with the scene's prompt only. "auto" is "tara", and "others" where text
            and image are one sequence.
        leftover: Cells where the map of the nearest subject is below this share of its maximum are in no region: no
            LoRA of a subject acts there, the bias is against the words of all, and where regions of UNets have texts of
            their own, `background` is read. Below 1; 0 divides the whole canvas.
        drafts: The most drafts of an image. A further one, from the same noise in another order, is made as long as two
            subjects are closer than `spacing`; without enough space in any, the one with most is taken.
        spacing: Least distance of the centres of two subjects, in sides of an equal part of the canvas.
        restart: Whether the image starts again from the noise once the canvas is divided. With "never" it continues
            from the draft: the drafted steps but the last are its own, and LoRAs act from there on. "auto" continues
            where text and image are one sequence and the scheduler replaces the noise in every step (`renews_noise`).
        limit: The most that LoRAs which act on the same cells may change a layer together, as a multiple of the largest
            change of one alone at weight 1; those of a layer with more are scaled down to it. None is no limit.
    """

    length: float | None = None
    layers: str | None = None
    threshold: float = THRESHOLD
    division: Division = "auto"
    reading: ReadingMode = "auto"
    background: BackgroundMode = "auto"
    apart: float = 0.4
    isolate: float | None = None
    bias: float = 1.0
    bias_steps: float | None = None
    norm_apart: float = NORM_APART
    keep_regions: bool = True
    token_mask: ChosenTokenMask = "auto"
    leftover: float = 0.0
    drafts: int = 1
    spacing: float = 0.6
    restart: RestartMode = "auto"
    limit: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self.limit)
        if self.length is not None and not 0 < self.length < math.inf:
            raise ValueError(f"length must be positive, not {self.length}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if not 0 <= self.bias < math.inf:
            raise ValueError(f"bias must be at least 0, not {self.bias}")
        for name in ("isolate", "bias_steps"):
            if (part := getattr(self, name)) is not None and not 0 <= part <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {part}")
        if not 0 <= self.leftover < 1:
            raise ValueError(f"leftover must be at least 0 and below 1, not {self.leftover}")
        for name in ("apart", "norm_apart"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not isinstance(self.drafts, int) or self.drafts < 1:
            raise ValueError(f"drafts must be a whole number, at least 1, not {self.drafts!r}")
        if not self.spacing >= 0:
            raise ValueError(f"spacing must be at least 0, not {self.spacing}")

    @property
    def needs(self) -> Needs:
        """Further drafts move the noise."""
        return Needs(start_noise=self.drafts > 1)

    def acting_together(self, concepts: ConceptSet, canvas: Canvas) -> Sequence[Together]:
        """Subjects whose given regions overlap, and each of the others, with all styles."""
        regions = {i: region for i in concepts.subjects if (region := concepts.concepts[i].region) is not None}
        groups = each_subject(concepts, overlapping(regions if self.keep_regions else {}, canvas))
        if self.limit is not None and (canvas.backbone.joint is None or not self._texts_by_region(concepts, canvas)):
            groups.append(of_one_text(concepts, canvas))
        return limited(groups, self.limit)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """Checks that LoRAs of several subjects have trigger and class word, and that every prompt names them."""
        subjects = [i for i, each in enumerate(concepts) if not each.concept.is_style]
        if len(subjects) < 2:
            return
        if prompts is None:
            raise ValueError("draft reads the prompt without triggers, so it needs prompts, not prompt_embeds")
        every = [each.concept for each in concepts]
        for i in subjects:
            if not (every[i].is_bystander or (every[i].trigger and every[i].class_word)):
                raise ValueError(f"draft looks for class words: {missing_words(concepts[i], prompts[0])}")
        branch_of(None, prompts, every, subjects)  # raises for words that a prompt lacks

    def start(self, session: Session) -> Process:
        """Encodes the texts of the draft and of the regions. A single subject acts in its region, or everywhere."""
        concepts, canvas, prompts = session.concepts, session.canvas, session.prompts
        if len(concepts.subjects) < 2:
            boxed = self.keep_regions and any(concepts.concepts[i].region for i in concepts.subjects)
            alone = Regional(token_mask=self.token_mask, norm_apart=self.norm_apart) if boxed else Merge()
            return alone.start(session)
        self.check_concepts(concepts.loaded, prompts.texts)
        base = branch_of(None, prompts.texts or (), concepts.concepts, concepts.subjects)
        styles = concepts.with_styles(())
        text = prompts.encode(styles, base.prompts, None, base.names, base.mentions)
        words = prompts.find(base.prompts, base.names, base.mentions).phrase[..., list(concepts.subjects)]
        words = words / words.sum(dim=1, keepdim=True)
        words = words.repeat_interleave(canvas.images_per_prompt, dim=0).to(canvas.device)
        draft = session.denoiser.prepare(Pass(text, constant_gates(session, styles)))
        return Drafting(self, session, draft, words, self._read_layers(session), self._restart(session))

    def _read_layers(self, session: Session) -> Sequence[str]:
        known, start = session.canvas.backbone.word_layers, f"{self.layers}." if self.layers else ""
        layers = [name for name in known if self.layers is not None and f"{name}.".startswith(start)]
        if self.layers is not None and not layers:
            raise ValueError(f"no attention layer begins with {self.layers!r}; there are {', '.join(known)}")
        return layers

    def length_in(self, canvas: Canvas) -> float:
        """The part of the steps that is drafted with a model."""
        return self.length if self.length is not None else LENGTH if canvas.backbone.joint is None else LENGTH_JOINT

    def isolate_in(self, canvas: Canvas) -> float:
        """The part of the steps in which regions are isolated with a model."""
        return self.isolate if self.isolate is not None else 1.0 if canvas.backbone.joint is None else APART_JOINT

    def bias_steps_in(self, canvas: Canvas) -> float:
        """The part of the steps with a bias, with a model; 0 if there is none."""
        if not self.bias:
            return 0.0
        return self.bias_steps if self.bias_steps is not None else 1.0 if canvas.backbone.joint is None else APART_JOINT

    def _restart(self, session: Session) -> "Restart":
        if not self._texts_by_region(session.concepts, session.canvas):
            return _by_scene(self, session)
        return _by_regions(self, session) if session.canvas.backbone.joint is None else _by_segments(self, session)

    def _texts_by_region(self, concepts: ConceptSet, canvas: Canvas) -> bool:
        if self.reading != "auto":
            return self.reading != "scene"
        subjects = [concepts.concepts[i] for i in concepts.subjects]
        if any(concept.prompt is not None for concept in subjects):
            return True
        if canvas.backbone.joint is not None:
            return False
        if any(concept.negative_prompt is not None for concept in subjects):
            return True
        room = len(subjects) * _side(canvas) <= max(canvas.latent_grid)
        return beside_its_class(subjects) or (len(subjects) > 2 and room)


def _side(canvas: Canvas) -> int:
    """Least side of a region's own canvas, in latent cells."""
    return math.ceil(canvas.backbone.native_side * APART_SIDE)


@dataclass(frozen=True)
class Restart:
    """How the image is denoised once the canvas is divided.

    Attributes:
        text: The text that callbacks see.
        divide: Divides the free cells between subjects, given their centres and a mask with 1 at free cells.
        start: Starts the process, given masks. Shape: [images, subjects, height, width] on the latent grid.
    """

    text: Conditioning
    divide: Callable[[Tensor, Tensor], Tensor]
    start: Callable[[Tensor], Process]


def _by_scene(settings: Draft, session: Session) -> Restart:
    """All cells read the scene's prompt, drawn to the words of their subject; LoRAs are gated as in `regional`."""
    canvas, texts = session.canvas, shared_text(session)
    isolated = 0.0 if canvas.backbone.joint is None else settings.isolate_in(canvas)
    biased = settings.bias_steps_in(canvas)

    def start(masks: Tensor) -> Process:
        phases = []
        for until in sorted({isolated, biased, 1.0} - {0.0}):
            bias = settings.bias if until <= biased else 0.0
            if until <= isolated:
                process = _in_one_sequence(settings, session, one_segment(texts), bias, 1.0, masks)
            else:
                process = _gated_by_region(settings, session, texts, bias, masks)
            phases.append((until, process))
        return phases[0][1] if len(phases) == 1 else InTurn(phases, texts.text)

    return Restart(texts.text, strips if settings.division == "strips" else nearest, start)


def _gated_by_region(settings: Draft, session: Session, texts: GatedText, bias: float, masks: Tensor) -> Process:
    shares, everywhere = _by_level(session, masks), _everywhere(session)
    spec = _pass(settings, session, texts, shares, bias)
    return with_region_norm(session, spec, shares, everywhere, settings.norm_apart)


def _pass(
    settings: Draft,
    session: Session,
    texts: GatedText,
    shares: Mapping[int, Tensor],
    bias: float,
    image: int | None = None,
) -> Pass:
    """A pass with LoRAs in the regions and a bias to their words."""
    everywhere = _everywhere(session)
    words = token_mask_in(session.canvas, settings.token_mask)
    spec = gated_pass(session, texts, shares, everywhere, token_mask=words, image=image)
    if not bias:
        return spec
    subjects = list(session.concepts.subjects)
    phrases = texts.text.phrase_mask[texts.text.roles.conditional][..., subjects]
    regions = {level: share[..., subjects] for level, share in shares.items()}
    if settings.leftover:  # one more region, without words
        regions = {level: torch.cat([share, (1 - share.sum(dim=-1, keepdim=True)).clamp(min=0)], dim=-1)
                   for level, share in regions.items()}  # fmt: skip
        phrases = F.pad(phrases, (0, 1))
    return replace(spec, text_bias=region_bias(texts.text, regions, phrases, bias, -bias))


def _everywhere(session: Session) -> Sequence[bool]:
    """True for concepts that act on the whole canvas."""
    return [concept.is_style for concept in session.concepts.concepts]


def _by_level(session: Session, masks: Tensor) -> Mapping[int, Tensor]:
    """By level, the share of each concept in each cell, [images, cells, concepts]; a style has all of them."""
    concepts, canvas = session.concepts, session.canvas
    shares = torch.ones(len(masks), len(concepts.loaded), *masks.shape[2:])
    shares[:, list(concepts.subjects)] = masks
    by_level = {}
    for level in canvas.levels:
        coarse = torch.stack([coarse_mask(mask, level) for mask in shares.flatten(0, 1)])
        by_level[level] = coarse.flatten(1).unflatten(0, shares.shape[:2]).transpose(1, 2).to(canvas.device)
    return by_level


def _by_regions(settings: Draft, session: Session) -> Restart:
    """Every region reads a text of its own, as in `lora-composer` without updates."""
    indices = session.concepts.subjects
    subjects = [session.concepts.concepts[i] for i in indices]
    scene, alone = session.prompts.texts or (), settings.reading == "subjects"
    prompts = [[about(subject, prompt, subjects, alone=alone) for prompt in scene] for subject in subjects]
    background = "surroundings" if settings.background == "auto" else settings.background
    texts = region_texts(session, indices, prompts, background)

    def start(masks: Tensor) -> Process:
        by_image = [Regions.of_masks(indices, image, session.canvas.levels, HALF) for image in masks]
        processes = [
            compose_regions(
                session, regions, texts.of_image(image), isolate=settings.isolate_in(session.canvas),
                apart=settings.apart, image=image,
            )
            for image, regions in enumerate(by_image)
        ]  # fmt: skip
        return ImageByImage(processes, texts.background)

    # Borders at which the canvases of the first steps do not overlap.
    block, side = 2 ** max(session.canvas.levels), _side(session.canvas)
    blocks = partial(strips, block=block, side=side) if settings.apart > 0 else strips
    return Restart(texts.background, nearest if settings.division == "nearest" else blocks, start)


def _by_segments(settings: Draft, session: Session) -> Restart:
    """Every region of a transformer reads a text of its own, as in `regional`."""
    background = "scene" if settings.background == "auto" else settings.background
    texts = segment_texts(session, session.concepts.subjects, background, alone=settings.reading == "subjects")
    start = partial(_in_one_sequence, settings, session, texts, 0.0, settings.isolate_in(session.canvas))
    return Restart(texts.base, strips if settings.division == "strips" else nearest, start)


def _in_one_sequence(
    settings: Draft, session: Session, texts: SegmentedTexts, bias: float, isolate: float, masks: Tensor
) -> Process:
    """A pass for each image of a transformer, in which who attends to whom depends on the regions."""
    joint = session.canvas.backbone.joint
    assert joint is not None, "asked before"
    by_level, processes = _by_level(session, masks), []
    for image, image_masks in enumerate(masks):
        cells = Regions.of_masks(session.concepts.subjects, image_masks, [joint.level], HALF).cells[joint.level]
        of_image = {level: shares[image : image + 1] for level, shares in by_level.items()}
        pass_of = partial(_pass, settings, session, shares=of_image, bias=bias, image=image)
        processes.append(isolated_at_first(session, texts.of_image(image), cells, joint, pass_of, isolate))
    return ImageByImage(processes, texts.base)


@dataclass
class Drafting:
    """The process of a draft for one call.

    Attributes:
        words: Weight of every token in the map of each subject. Shape: [images, tokens, subjects].
        layers: The layers whose maps are taken; none means those of the model.
        restart: How the image is denoised.
        outputs: The model's output in the drafted steps that the image continues from; none if it starts again. Shape
            of each: that of the latents.
        maps: The maps by which subjects were found; 0 for concepts that were not looked for, None if nothing was.
        masks: The masks of all concepts on the map grid. Shape of both: [images, concepts, height, width].
    """

    settings: Draft
    session: Session
    draft: PreparedPass
    words: Tensor
    layers: Sequence[str]
    restart: Restart
    outputs: Sequence[Tensor] = ()
    maps: Tensor | None = None
    masks: Tensor | None = None
    process: Process | None = None

    @property
    def text(self) -> Conditioning:
        """The text that callbacks see."""
        return self.restart.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Drafts the image and divides the canvas; returns the noise of the draft that is taken."""
        canvas, concepts = self.session.canvas, self.session.concepts
        subjects = [concepts.concepts[i] for i in concepts.subjects]
        regions = [_given(subject if self.settings.keep_regions else None, canvas) for subject in subjects]
        map_grid = grid_at(canvas.latent_grid, canvas.map_level)
        # With a given region for each subject there is nothing to find.
        nothing = all(region.any() for region in regions)
        maps = torch.zeros(canvas.images, len(regions), *map_grid)
        if not nothing:
            latents, maps = self._drafted(latents, first, subjects, regions)
            by_concept = torch.zeros(len(maps), len(concepts.loaded), *map_grid)
            by_concept[:, list(concepts.subjects)] = maps
            self.maps = by_concept
            self.session.log.keep_draft(by_concept)
        divide, threshold, leftover = self.restart.divide, self.settings.threshold, self.settings.leftover
        masks = torch.stack(
            [divided(image, subjects, regions, divide, threshold, canvas.painted, leftover) for image in maps]
        )
        self.process = self.restart.start(masks)
        self.masks = torch.ones(len(maps), len(concepts.loaded), *maps.shape[2:], dtype=torch.bool)
        self.masks[:, list(concepts.subjects)] = F.interpolate(masks, maps.shape[2:], mode="area") >= 0.5
        return latents

    def _drafted(
        self, latents: Tensor, first: Step, subjects: Sequence[Concept], regions: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The noise of each image, and its maps: of several drafts those in which the subjects have space."""
        settings = self.settings
        maps, outputs = self._maps(latents, first, self.draft, self.words)
        if self._continues:
            self.outputs = outputs
        if settings.drafts == 1:
            return latents, maps
        threshold, painted = settings.threshold, self.session.canvas.painted
        wanted = settings.spacing if self.session.denoiser.has_values else math.inf
        space = partial(spacing, subjects=subjects, regions=regions, threshold=threshold, painted=painted)
        chosen, spec = list(latents.split(1)), self.draft.spec
        for i, image in enumerate(maps):
            best = space(image)
            if best >= wanted:
                continue
            draft = self.session.denoiser.prepare(replace(spec, text=spec.text.of_image(i), image=i))
            for turn in range(1, settings.drafts):
                noise = reordered(latents[i : i + 1], turn)
                (redrafted,), outputs = self._maps(noise, first, draft, self.words[i : i + 1], [i])
                if (far := space(redrafted)) > best:
                    best, chosen[i], maps[i] = far, noise, redrafted
                    for kept, (output,) in zip(self.outputs, outputs, strict=False):
                        kept[i] = output
                if best >= wanted:
                    break
        return torch.cat(chosen), maps

    def _maps(
        self, latents: Tensor, first: Step, draft: PreparedPass, words: Tensor, images: Sequence[int] | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The attention to each subject in a draft, on the CPU, and the outputs of its steps but the last.

        Shapes: [images, subjects, height, width]; that of the latents.
        """
        canvas, request = self.session.canvas, MapRequest(words, layers=self.layers)
        length, of_last = self.settings.length_in(canvas), canvas.backbone.joint is not None
        steps = drafted(self.session, latents, first, draft, request, length, of_last=of_last, images=images)
        mean = torch.stack([maps.text for maps in steps.maps]).mean(dim=0)
        return mean.transpose(1, 2).unflatten(2, grid_at(canvas.latent_grid, canvas.map_level)).cpu(), steps.outputs

    @property
    def _continues(self) -> bool:
        """Whether the image continues from the draft."""
        if self.settings.restart != "auto":
            return self.settings.restart == "never"
        return self.session.canvas.backbone.joint is not None and renews_noise(self.session.denoiser.sampler.scheduler)

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """A step of what was started in the divided canvas, or a drafted one that the image continues from."""
        assert self.masks is not None, "prepare comes before the first step"
        assert self.process is not None
        self.session.log.keep_masks(step.index, self.masks)
        if step.index < len(self.outputs):
            # Schedulers such as Euler's warn if a step comes without it.
            self.session.denoiser.sampler.scaled(latents, step.t)
            return latents, self.outputs[step.index]
        return self.process.step(latents, step)


def _given(subject: Concept | None, canvas: Canvas) -> Tensor:
    """The given region; empty if there is none. Shape: [height, width] of the latents, bool."""
    if subject is None or subject.region is None:
        return torch.zeros(canvas.latent_grid, dtype=torch.bool)
    return cells_of(region_mask(subject.region, canvas.image_size, canvas.latent_grid, sharp=True), 0.5)


@dataclass(frozen=True)
class Drafted:
    """Where each LoRA would act in an image.

    Attributes:
        maps: Mean attention to each subject over the draft; 0 for concepts that were not looked for. fp32.
        masks: The cells of each concept; a style has all. Shape of both: [images, concepts, height, width], bool.
    """

    maps: Tensor
    masks: Tensor


def draft_only(pipe: Callable[..., Any], settings: Draft, **arguments: Any) -> Drafted:
    """The draft of a call without its image: where each LoRA would act, for the price of the drafted steps.

    The call with the same arguments and `method=settings` divides the canvas in the same way.

    Args:
        pipe: A pipeline of ours.
        arguments: Arguments of the pipeline's call, but for the method; one prompt.

    Raises:
        ValueError: Whatever the call would raise; for fewer than two subjects; where all have regions that are kept.
    """
    if not isinstance(arguments.get("prompt"), str):
        raise ValueError("a draft without its image is that of one prompt, given as text; call it for each")
    try:
        pipe(**arguments, method=_DraftOnly(settings))
    except _Found as ended:
        return ended.drafted
    raise RuntimeError("the call has ended without a draft")


class _Found(Exception):  # noqa: N818 (nothing has gone wrong)
    """Ends a call once its canvas is divided."""

    def __init__(self, drafted: Drafted) -> None:
        super().__init__("the canvas is divided")
        self.drafted = drafted


@dataclass(frozen=True)
class _DraftOnly(Settings):
    """`Draft` up to the division."""

    settings: Draft

    def start(self, session: Session) -> Process:
        process = self.settings.start(session)
        if not isinstance(process, Drafting):
            raise ValueError("one subject alone is not drafted: its LoRA acts everywhere; name two or more")
        return _UntilDivided(process)


@dataclass(frozen=True)
class _UntilDivided:
    drafting: Drafting

    @property
    def text(self) -> Conditioning:
        return self.drafting.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        self.drafting.prepare(latents, first)
        if self.drafting.maps is None or self.drafting.masks is None:
            raise ValueError(
                "every subject has a region, so nothing is drafted; leave one out, or use keep_regions=False"
            )
        raise _Found(Drafted(self.drafting.maps, self.drafting.masks))

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        raise RuntimeError("the call has gone on after its draft")
