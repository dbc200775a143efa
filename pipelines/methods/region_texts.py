"""The texts of regions: one for the image and one for each region, for either kind of attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import JointRegions, Site
from lora_compose.pipelines.denoising.process import one_text, warn_unread
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.support.notes import warn_once
from lora_compose.pipelines.text.conditioning import Conditioning, stack_texts
from lora_compose.pipelines.text.prompts import about, surroundings, without_triggers
from lora_compose.pipelines.text.segments import join_segments

Background = Literal["surroundings", "scene"]
"""Text of the cells outside all regions: the prompt without the concepts, or the whole prompt without triggers."""


@dataclass(frozen=True, eq=False)
class RegionTexts:
    """The texts of the canvas and its regions.

    Attributes:
        background: Text 0, of the cells outside all regions.
        together: All texts, for the canvas of all regions.
        alone: All texts, for the canvas of each region.
    """

    background: Conditioning
    together: Conditioning
    alone: Sequence[Conditioning]

    def of_image(self, image: int) -> "RegionTexts":
        """The rows of one image."""
        alone = [text.of_image(image) for text in self.alone]
        return RegionTexts(self.background.of_image(image), self.together.of_image(image), alone)


def region_texts(
    session: Session, indices: Sequence[int], prompts: Sequence[Sequence[str]], background: Background = "surroundings"
) -> RegionTexts:
    """Text 0 for the background, with the LoRAs that have no region, and text 1 + n for region n with its LoRA.

    A text for the image as a whole (SDXL's pooled text, a ControlNet's) is that of the scene in plain words, and
    where region n has a canvas of its own, that of the region.

    Args:
        indices: Indices of the concepts that have a region.
        prompts: The text of each region, by prompt.
        background: Text of the cells outside all regions.
    """
    concepts, encode = session.concepts, session.prompts.encode
    scene = session.prompts.texts or ()
    placed = [concepts.concepts[i] for i in indices]
    others = [concept for i, concept in enumerate(concepts.concepts) if i not in indices and concept.trigger]
    # Concepts with a prompt of their own need not be named in the scene's, but these are read there.
    session.prompts.find(scene, [other.name for other in others])
    outside = without_triggers if background == "scene" else partial(surroundings, others=others)
    canvas = [outside(prompt, placed) for prompt in scene]
    behind = concepts.weights_of([i for i in range(len(concepts.loaded)) if i not in indices])
    texts = [encode(behind, canvas, names=[other.name for other in others])]
    for i, region_prompts in zip(indices, prompts, strict=True):
        negative = concepts.concepts[i].negative_prompt
        negatives = None if negative is None else [negative] * len(region_prompts)
        texts.append(encode(concepts.with_styles([i]), region_prompts, negatives, [concepts.concepts[i].name]))
    together = stack_texts(texts)
    if together.added is None and not session.denoiser.has_controlnet:
        return RegionTexts(texts[0], together, [together] * len(prompts))
    plain = [without_triggers(prompt, placed) for prompt in scene]
    whole = encode(behind, plain, names=[other.name for other in others])
    alone = [together.described_by(text) for text in texts[1:]]
    return RegionTexts(texts[0], together.described_by(whole), alone)


@dataclass(frozen=True, eq=False)
class GatedText:
    """The text of a pass in which LoRAs act in their regions.

    Attributes:
        text: The text, or all texts in one sequence.
        own: 1 at the tokens that a concept changes. Shape: [rows, tokens, concepts].
        regions: Region attention; None means that everything attends to everything.
        base: The text of the whole image.
    """

    text: Conditioning
    own: Tensor
    regions: JointRegions | None
    base: Conditioning


def shared_text(session: Session) -> GatedText:
    """The scene's text for all regions, with the text-encoder LoRAs of the styles."""
    concepts = session.concepts
    for loaded in concepts.loaded:
        if loaded.factors.text_encoders and not loaded.concept.is_style:
            warn_once(f"the text-encoder part of {loaded.concept.name!r} is left out: text has no regions")
    text = one_text(session, concepts.weights_of(concepts.styles))
    return GatedText(text, torch.ones_like(text.trigger_mask), None, text)


@dataclass(frozen=True, eq=False)
class SegmentedTexts:
    """A text for the image and one for each region, to be read in one sequence.

    Attributes:
        base: The text of the whole image.
        regions: The text of each region.
        owners: By concept, the text that it changes: 0 is that of the whole image; None stands for all of them.
    """

    base: Conditioning
    regions: tuple[Conditioning, ...]
    owners: tuple[int | None, ...]

    @property
    def alike(self) -> bool:
        """Whether each text has as many tokens in all images."""
        lengths = [text.conditional().lengths for text in (self.base, *self.regions)]
        return all(len(set(of_text)) == 1 for of_text in lengths)

    def of_image(self, image: int) -> "SegmentedTexts":
        """The rows of one image."""
        return replace(
            self, base=self.base.of_image(image), regions=tuple(text.of_image(image) for text in self.regions)
        )

    def read_in(
        self, cells: Tensor, joint: Site, *, hides_padding: bool, isolate: bool, device: torch.device
    ) -> GatedText:
        """The texts in one sequence, each read by the cells of its region.

        Args:
            cells: True where a region covers a cell. Shape: [height, width, regions], on the CPU.
            joint: How text and image lie in one sequence.
            hides_padding: As `Backbone.hides_padding`.
            isolate: Whether cells of a region attend to no cells of others.
        """
        segments = join_segments(self.base, self.regions, joint.multiple, hides_padding=hides_padding)
        text, roles = segments.text, segments.text.roles
        text_gates = torch.zeros_like(text.trigger_mask)
        text_gates[roles.unconditional] = 1
        for i, owner in enumerate(self.owners):
            text_gates[roles.conditional, slice(None) if owner is None else segments.of(owner), i] = 1
        unconditional = [not row.conditional for row in roles.each]
        regions = JointRegions.of(
            joint, cells.flatten(0, 1), segments.lengths, unconditional, isolate=isolate, hidden=segments.hidden,
            positions=segments.positions, device=device,
        )  # fmt: skip
        return GatedText(text, text_gates, regions, self.base)


def one_segment(shared: GatedText) -> SegmentedTexts:
    """A text that all regions read, for passes in which they are isolated."""
    return SegmentedTexts(shared.text, (), (None,) * shared.own.shape[-1])


def segment_texts(
    session: Session, indices: Sequence[int], background: Background = "scene", *, alone: bool = False
) -> SegmentedTexts:
    """A text for the image, without the triggers of regions, and one for each region. Unconditional rows do not change.

    Args:
        indices: Indices of the concepts that have a region.
        background: The text for the image, which all cells read. What a model reads as one vector of the whole text
            (FLUX.1's pooled text) is that of the scene either way.
        alone: Whether a region's text names its subject alone, without the scene.
    """
    concepts, encode = session.concepts, session.prompts.encode
    scene, prompts = concepts.concepts, session.prompts.texts or ()
    warn_unread([], scene, "the negative prompt is the call's in all regions")
    placed, others = [scene[i] for i in indices], [concept for i, concept in enumerate(scene) if i not in indices]
    plain = [without_triggers(prompt, placed) for prompt in prompts]
    named = [other.name for other in others if other.trigger and other.prompt is None]
    base = encode(concepts.weights_of(concepts.styles), plain, names=named)
    if background == "surroundings":
        kept = [other for other in others if other.name in named]
        behind = [surroundings(prompt, placed, kept) for prompt in prompts]
        whole, base = base.added or {}, encode(concepts.weights_of(concepts.styles), behind, names=named)
        if "pooled_projections" in whole:
            base = replace(base, added={**(base.added or {}), "pooled_projections": whole["pooled_projections"]})
    texts = []
    for i in indices:
        region_prompts = [about(scene[i], prompt, placed, alone=alone) for prompt in prompts]
        named = scene[i].trigger or scene[i].is_bystander
        texts.append(encode(concepts.with_styles([i]), region_prompts, names=[scene[i].name] if named else []))
    of = [None if concept.is_style else 1 + indices.index(i) if i in indices else 0 for i, concept in enumerate(scene)]
    return SegmentedTexts(base, tuple(texts), tuple(of))
