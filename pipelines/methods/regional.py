"""Regional: every LoRA acts inside its region, and on the prompt only.

The simplest use of regions, for any LoRA and without optimisation. For concept i with region mask M_i [cells] on the
grid of each layer and token mask m_i, which is that of its trigger for a LoRA trained with TARA and 1 for any other,

    layers that see image cells:            y = W x + sum_i diag(M_i) Delta_i x
    keys and values of cross-attention:     K = X W_K^T + sum_i diag(m_i) X Delta_{i,K}^T        (the same for V)

both on the rows of the prompt. The rows of the negative prompt stay those of the base model, so guidance points from
the base model's prediction to that of the LoRAs, and strengthens identities. A style acts on all cells and tokens. The
method gates LoRAs; it does not move objects into their regions. `docs/methods/regional.md` measures the contribution of
each part.

Transformers attend to text and image in one sequence. There no LoRA changes the words of other subjects, and in the
first steps the cells of a region do not attend to those of others (`attention/joint_regions.py`). With prompts of their
own, each region has its own text, about its concept alone, and the image has a text without triggers; the LoRA changes
its own text and its own cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import NORM_APART, Site, grid_at
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.process import (
    ActingRows,
    FixedPasses,
    ImageByImage,
    Process,
    Settings,
    check_choices,
    check_limit,
    check_regions,
)
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.denoising.together import Together, each_subject, limited, of_one_text, overlapping
from lora_compose.pipelines.methods.gated_pass import (
    ChosenTokenMask,
    gated_pass,
    isolated_at_first,
    token_mask_in,
    with_region_norm,
)
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.region_texts import (
    Background,
    SegmentedTexts,
    one_segment,
    segment_texts,
    shared_text,
)
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.scene.division import APART_JOINT
from lora_compose.pipelines.scene.regions import HALF, Regions, read_mask, region_mask
from lora_compose.pipelines.support.notes import warn_once
from lora_compose.pipelines.text.missing import Described
from lora_compose.pipelines.text.tokens import is_named


@dataclass(frozen=True)
class Regional(Settings):
    """Every LoRA acts in its own region; nothing moves objects into their regions.

    Attributes:
        rows: Where LoRAs act under guidance: "cond_only", on conditional rows; "all", also on unconditional rows, as
            LoRAs usually do.
        token_mask: The text that LoRAs change, on UNets its keys and values: "tara", those whose files say that they
            were trained with TARA their own trigger, and others every token (they keep a part of their subject in other
            words); "others", the same, but others all except the words of other subjects; "all", their own trigger;
            "phrase", their own trigger and class word; "image", no token; or "none", every token. A style, or a concept
            without a trigger, changes all tokens.
        texts: "regions", each region has its own text, about its subject in the scene; "subjects", about its subject
            alone, so that the whole image's text alone tells the scene; "shared", all read the prompt; "auto", regions
            on transformers if a concept with a region has a prompt of its own, otherwise shared.
        background: With texts of regions, what all cells read besides: the "scene" without triggers, or its
            "surroundings" without the concepts, so that no cell reads of a subject that is elsewhere.
        isolate: The part of the steps, from the first, in which cells of a region do not attend to cells of other
            regions, on transformers with text and image in one sequence. All steps (1) separate identities best but
            make incoherent images. None is 0.5 there.
        norm_apart: On UNets, the part of the steps, from the first, in which group normalisation takes mean and
            variance region by region; 0 takes the whole canvas in all steps, and a LoRA weakens objects elsewhere.
        limit: The most that LoRAs which act on the same cells may change a layer together, as a multiple of the largest
            change of one alone at weight 1; those of a layer with more are scaled down to it. None is no limit.
    """

    rows: ActingRows = "cond_only"
    token_mask: ChosenTokenMask = "auto"
    texts: Literal["auto", "shared", "regions", "subjects"] = "auto"
    background: Background = "scene"
    isolate: float | None = None
    norm_apart: float = NORM_APART
    limit: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self.limit)
        for name in ("isolate", "norm_apart"):
            if (part := getattr(self, name)) is not None and not 0 <= part <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {part}")

    def acting_together(self, concepts: ConceptSet, canvas: Canvas) -> Sequence[Together]:
        """Subjects whose regions overlap, and each of the others, with all styles."""
        regions = {i: concepts.concepts[i].region for i in concepts.subjects}
        groups = each_subject(concepts, overlapping(regions, canvas))
        if self.limit is not None and not self._reads_own_texts(concepts, canvas):
            groups.append(of_one_text(concepts, canvas))
        return limited(groups, self.limit)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """At least one subject needs a region."""
        check_regions("regional", concepts)

    def start(self, session: Session) -> Process:
        """Gates by region, token and row. A concept without a region acts everywhere. Styles alone are merged."""
        concepts, canvas = session.concepts, session.canvas
        if not concepts.subjects:
            return Merge().start(session)
        self.check_concepts(concepts.loaded, session.prompts.texts)
        self._check_model(canvas)
        wide = [concepts.concepts[i].name for i in concepts.with_loras if concepts.concepts[i].region is None]
        if wide and any(concept.is_bystander and concept.region is not None for concept in concepts.concepts):
            warn_once(f"without a region, {', '.join(wide)} acts on the whole image, also where bystanders are")
        masks = region_masks(session)
        everywhere = [concept.region is None for concept in concepts.concepts]

        words = token_mask_in(canvas, self.token_mask)
        pass_of = partial(gated_pass, session, masks=masks, everywhere=everywhere, rows=self.rows, token_mask=words)
        joint, own = canvas.backbone.joint, self._own_texts(session)
        owners = [i for i, whole in enumerate(everywhere) if not whole]
        isolate = 0.0 if len(owners) < 2 else APART_JOINT if self.isolate is None else self.isolate
        if joint is None or not (own or isolate):
            shared = shared_text(session)
            return with_region_norm(session, pass_of(shared), masks, everywhere, self.norm_apart, shared.base)
        if own:
            texts = segment_texts(session, owners, self.background, alone=self.texts == "subjects")
        else:
            texts = one_segment(shared_text(session))
        cells = given_cells(session, joint)

        def passes(texts: SegmentedTexts, image: int | None = None) -> FixedPasses:
            return isolated_at_first(session, texts, cells, joint, partial(pass_of, image=image), isolate)

        if joint.multiple == 1 or texts.alike:
            return passes(texts)
        # Where a text is not padded, the positions of all that follows depend on its length.
        by_image = [passes(texts.of_image(image), image) for image in range(canvas.images)]
        return ImageByImage(by_image, texts.base)

    def _check_model(self, canvas: Canvas) -> None:
        if canvas.backbone.joint is not None:
            return
        if self.texts in ("regions", "subjects"):
            raise ValueError(
                f"texts={self.texts!r} needs a transformer that attends to text and image in one sequence; in this "
                "model the image reads the text by cross-attention: use method='lora-composer', which gives each "
                "region a text there, or texts='shared'"
            )
        if self.isolate:
            raise ValueError(
                "isolate needs a transformer that attends to text and image in one sequence; use method='lora-composer'"
            )

    def _reads_own_texts(self, concepts: ConceptSet, canvas: Canvas) -> bool:
        """Whether each region is meant to read its own text."""
        if self.texts != "auto":
            return self.texts != "shared"
        prompted = any(each.prompt is not None for each in concepts.concepts if each.region is not None)
        return prompted and canvas.backbone.joint is not None

    def _own_texts(self, session: Session) -> bool:
        """Whether each region reads its own text."""
        if not self._reads_own_texts(session.concepts, session.canvas):
            return False
        unnamed = _unnamed(session)
        if unnamed and self.texts != "auto":
            raise ValueError(
                f"texts={self.texts!r} needs a text about each concept that has a region, and {', '.join(unnamed)} is "
                "not named in every prompt: write its words there, or give it a prompt of its own"
            )
        if unnamed:
            warn_once(f"regional reads one text in all regions: no other can be made about {', '.join(unnamed)}")
        return not unnamed


def region_masks(session: Session) -> dict[int, Tensor]:
    """By level, the concepts' regions on its grid; 1 everywhere without a region. Shape: [1, cells, concepts] each."""
    canvas, by_level = session.canvas, {}
    given = [concept.region for concept in session.concepts.concepts]
    regions = [read_mask(region) if isinstance(region, str) else region for region in given]  # once for all levels
    for level in canvas.levels:
        grid = grid_at(canvas.latent_grid, level)
        masks = [region_mask(region, canvas.image_size, grid) for region in regions]
        by_level[level] = torch.stack(masks, dim=-1).flatten(0, 1)[None].to(canvas.device)
    return by_level


def given_cells(session: Session, joint: Site) -> Tensor:
    """The cells of the regions that the user gives. Shape: [height, width, regions], bool, on the CPU."""
    canvas = session.canvas
    regions = [concept.region for concept in session.concepts.concepts]
    return Regions.of(regions, canvas.image_size, canvas.latent_grid, canvas.levels, HALF).cells[joint.level]


def _unnamed(session: Session) -> list[str]:
    """Concepts with a region for which no text can be made."""
    owners = [concept for concept in session.concepts.concepts if concept.region is not None]
    texts = session.prompts.texts
    if texts is None:
        return [concept.name for concept in owners]
    return [
        concept.name
        for concept in owners
        if concept.prompt is None and not all(is_named(concept, text, owners) for text in texts)
    ]
