"""Regional: every LoRA acts inside its region, and on the prompt only.

The simplest use of regions, for any LoRA and without optimisation. For concept i with region mask M_i [cells] on the
grid of each layer and token mask m_i, which is that of its trigger for a LoRA trained with TARA and 1 for any other,

    layers that see image cells:            y = W x + sum_i diag(M_i) Delta_i x
    keys and values of cross-attention:     K = X W_K^T + sum_i diag(m_i) X Delta_{i,K}^T        (the same for V)

both on the rows of the prompt. The rows of the negative prompt stay those of the base model, so guidance points from
the base model's prediction to that of the LoRAs, and strengthens identities. A style acts on all cells and tokens. The
method gates LoRAs; it does not move objects into their regions. `docs/methods/regional.md` measures the contribution of
each part.

Transformers attend to text and image in one sequence, and their encoders mix the concepts of one prompt. There each
region has its own text, about its concept alone, and the image has a text without triggers
(`attention/joint_regions.py`); the LoRA changes its own text and its own cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_compose.attention import Gates, JointRegions, Site, grid_at
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.process import FixedPasses, one_text, warn_once, warn_unread
from lora_compose.pipelines.passes import Pass
from lora_compose.pipelines.regions import Regions, region_mask
from lora_compose.pipelines.session import Session
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.prompts import about, without_triggers
from lora_compose.pipelines.text.segments import join_segments
from lora_compose.pipelines.text.tokens import find_words

Rows = Literal["cond_only", "all"]
TokenMask = Literal["tara", "all", "none"]
Texts = Literal["auto", "shared", "regions"]


@dataclass(frozen=True)
class Regional:
    """Every LoRA acts in its own region; nothing moves objects into their regions.

    Attributes:
        rows: Where LoRAs act under guidance: "cond_only", on conditional rows; "all", also on unconditional rows, as
            LoRAs usually do.
        token_mask: Which LoRAs change keys and values of cross-attention only at their own trigger: "tara", LoRAs whose
            files say that they were trained with TARA (others keep a part of their subject in the keys and values of
            other words); "all"; or "none". A style, or a concept without a trigger, changes them at all tokens.
        texts: "regions", each region has its own text; "shared", all read the prompt; "auto", regions on transformers,
            if a text can be made for each concept with a region, otherwise shared.
        isolate: Whether cells of a region do not attend to cells of other regions. It separates identities best but
            makes incoherent images. Needs a text for each region.
    """

    rows: Rows = "cond_only"
    token_mask: TokenMask = "tara"
    texts: Texts = "auto"
    isolate: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("rows", Rows), ("token_mask", TokenMask), ("texts", Texts)):
            allowed = get_args(choices)
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    def start(self, session: Session) -> FixedPasses:
        """Gates by region, token and row. A concept without a region acts everywhere. Styles alone are merged."""
        concepts, canvas = session.concepts, session.canvas
        if not concepts.subjects:
            return Merge().start(session)
        if all(concept.region is None for concept in concepts.concepts):
            raise ValueError(
                "regional needs to know where the concepts are: give at least one a region, for example "
                "Concept(name='cat', region=(left, top, right, bottom)) in pixels"
            )
        masks = {level: region_masks(session, level) for level in canvas.levels}
        everywhere = [concept.region is None for concept in concepts.concepts]
        texts = self._texts(session)
        spec = self.gated(session, texts, masks, everywhere)
        return FixedPasses(session, [[(spec, 1.0)]], text_for_callbacks=texts.base)

    def gated(
        self, session: Session, texts: "TextsOfRegions", masks: Mapping[int, Tensor], everywhere: Sequence[bool]
    ) -> Pass:
        """A pass in which LoRAs act under masks.

        Args:
            session: The call.
            texts: The texts of the regions.
            masks: By level, the share of each concept in each cell, the same for all images or by image. Shape:
                [(images,) cells, concepts].
            everywhere: True for concepts that act on the whole canvas.
        """
        concepts, canvas, text = session.concepts, session.canvas, texts.text
        weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)[None]
        live = torch.ones(text.rows, 1, 1, device=canvas.device)
        if self.rows == "cond_only":
            live[: text.conditional_rows.start] = 0
        mask = text.trigger_mask
        named = mask.sum(dim=(0, 1)) > 0
        masked = torch.tensor([self._keeps_to_its_words(loaded) for loaded in concepts.loaded], device=canvas.device)
        tokens = torch.where(named & masked, mask, torch.ones_like(mask)) * texts.own
        by_row = {
            level: mask if mask.dim() == 2 else mask.repeat(text.rows // text.images, 1, 1)
            for level, mask in masks.items()
        }
        constant = torch.tensor(everywhere).to(canvas.device, torch.float32)
        gates = Gates(
            text=live * tokens * weights[:, None],
            image={level: live * mask * weights[:, None] for level, mask in by_row.items()},
            row=live[:, 0] * weights,
            latent_grid=canvas.latent_grid,
            # A transformer's modulation scales all cells alike, so a region would leak into the others.
            modulation=live[:, 0] * weights * constant,
        )
        return Pass(text, gates, joint_regions=texts.regions)

    def _texts(self, session: Session) -> "TextsOfRegions":
        joint = session.canvas.backbone.joint
        unnamed = _unnamed(session)
        if self.texts == "regions" and joint is None:
            raise ValueError(
                "texts='regions' needs a transformer, which attends to text and image in one sequence; use "
                "method='lora-composer', or texts='shared'"
            )
        if self.texts == "regions" and unnamed:
            raise ValueError(
                f"texts='regions' needs a text about each concept that has a region, and {', '.join(unnamed)} is not "
                "named in every prompt: write its trigger there, or give it a prompt of its own"
            )
        if joint is not None and self.texts != "shared" and not unnamed:
            return segmented(session, joint, isolate=self.isolate)
        if self.isolate:
            raise ValueError("isolate needs texts of regions (texts='regions'), which only transformers have")
        if joint is not None and unnamed:
            warn_once(f"regional reads one text in all regions: no other can be made about {', '.join(unnamed)}")
        return shared_text(session)

    def _keeps_to_its_words(self, loaded: LoadedConcept) -> bool:
        """Whether a concept with a trigger gets a token mask."""
        if loaded.concept.is_style or self.token_mask == "none":
            return False
        return self.token_mask == "all" or loaded.trained_with == "tara"


def region_masks(session: Session, level: int) -> Tensor:
    """The concepts' regions on the grid of a level; 1 everywhere without a region. Shape: [cells, concepts]."""
    canvas = session.canvas
    grid = grid_at(canvas.latent_grid, level)
    masks = [region_mask(concept.region, canvas.image_size, grid) for concept in session.concepts.concepts]
    return torch.stack(masks, dim=-1).flatten(0, 1).to(canvas.device)


@dataclass(frozen=True, eq=False)
class TextsOfRegions:
    """The texts of the regions.

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


def shared_text(session: Session) -> TextsOfRegions:
    """The scene's text for all regions, with the text-encoder LoRAs of the styles."""
    concepts = session.concepts
    for loaded in concepts.loaded:
        if loaded.factors.text_encoders and not loaded.concept.is_style:
            warn_once(f"the text-encoder part of {loaded.concept.name!r} is left out: text has no regions")
    text = one_text(session, concepts.weights_of(concepts.styles))
    return TextsOfRegions(text, torch.ones_like(text.trigger_mask), None, text)


@dataclass(frozen=True, eq=False)
class SegmentedTexts:
    """A text for the image and one for each region, in one sequence.

    Attributes:
        text: All of them.
        own: 1 at the tokens that a concept changes. Shape: [rows, tokens, concepts].
        lengths: Tokens of text 0, and of the text of each region.
        hidden: True at padding inside them. Shape: [rows, tokens].
        base: The text of the whole image.
    """

    text: Conditioning
    own: Tensor
    lengths: tuple[int, ...]
    hidden: Tensor | None
    base: Conditioning

    def of_image(self, image: int) -> "SegmentedTexts":
        """The rows of one image."""
        rows = slice(image, None, self.text.images)
        hidden = None if self.hidden is None else self.hidden[rows]
        return replace(
            self, text=self.text.of_image(image), own=self.own[rows], hidden=hidden, base=self.base.of_image(image)
        )

    def read_in(self, cells: Tensor, joint: Site, *, isolate: bool, device: torch.device) -> TextsOfRegions:
        """The same, each text read by the cells of its region.

        Args:
            cells: True where a region covers a cell. Shape: [height, width, regions], on the CPU.
            joint: How text and image lie in one sequence.
            isolate: Whether cells of a region attend to no cells of others.
            device: Where attention runs.
        """
        unconditional = [row < self.text.conditional_rows.start for row in range(self.text.rows)]
        regions = JointRegions.of(
            joint, cells.flatten(0, 1), self.lengths, unconditional, isolate=isolate, hidden=self.hidden, device=device
        )
        return TextsOfRegions(self.text, self.own, regions, self.base)


def segment_texts(session: Session, indices: Sequence[int]) -> SegmentedTexts:
    """A text for the image, without the triggers of regions, and one for each region. Unconditional rows do not change.

    Args:
        session: The call.
        indices: Indices of the concepts that have a region.
    """
    concepts, encode = session.concepts, session.prompts.encode
    every, prompts = concepts.concepts, session.prompts.texts or ()
    warn_unread([], every, "the negative prompt is the call's in all regions")
    mine, others = [every[i] for i in indices], [concept for i, concept in enumerate(every) if i not in indices]
    plain = [without_triggers(prompt, mine) for prompt in prompts]
    named = [other.name for other in others if other.trigger and other.prompt is None]
    base = encode(concepts.weights_of(concepts.styles), plain, names=named)
    texts = []
    for i in indices:
        own = [about(every[i], prompt, mine) for prompt in prompts]
        texts.append(encode(concepts.with_styles([i]), own, names=[every[i].name] if every[i].trigger else []))
    segments = join_segments(base, texts)
    text = segments.text
    act = torch.zeros_like(text.trigger_mask)
    first = text.conditional_rows.start
    act[:first] = 1
    for i, concept in enumerate(every):
        where = slice(None) if concept.is_style else segments.of(1 + indices.index(i) if i in indices else 0)
        act[first:, where, i] = 1
    return SegmentedTexts(text, act, segments.lengths, segments.hidden, base)


def segmented(session: Session, joint: Site, *, isolate: bool) -> TextsOfRegions:
    """The texts of `segment_texts`, for the regions that the user gives."""
    concepts, canvas = session.concepts.concepts, session.canvas
    indices = [i for i, concept in enumerate(concepts) if concept.region is not None]
    cells = Regions.of(
        [concept.region for concept in concepts], canvas.image_size, canvas.latent_grid, canvas.levels, HALF
    ).cells[joint.level]
    return segment_texts(session, indices).read_in(cells, joint, isolate=isolate, device=canvas.device)


HALF = 0.5
"""A cell reads the texts of regions that cover at least this share of it."""


def _unnamed(session: Session) -> list[str]:
    """Concepts with a region for which no text can be made."""
    mine = [concept for concept in session.concepts.concepts if concept.region is not None]
    texts = session.prompts.texts
    if texts is None:
        return [concept.name for concept in mine]
    return [
        concept.name
        for concept in mine
        if concept.prompt is None and not all(find_words(concept.trigger or "", text) for text in texts)
    ]
