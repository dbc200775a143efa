"""Regional: every LoRA acts inside its region, and on the prompt only.

The plain way to use a layout, for any LoRA and without optimisation. For concept i with region mask M_i [cells] on the
grid of each layer and token mask m_i, which is that of its trigger for a LoRA trained with TARA and 1 for any other,

    layers that see image cells:            y = W x + sum_i diag(M_i) Delta_i x
    keys and values of cross-attention:     K = X W_K^T + sum_i diag(m_i) X Delta_{i,K}^T        V likewise

both on the rows of the prompt. The rows of the negative prompt stay those of the base model, so guidance points from
what the base model paints to what the LoRAs paint, and strengthens the identities. A style acts on all cells and
tokens. It gates LoRAs; it does not move objects into their regions. `docs/methods/regional.md` shows what each part
contributes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_compose.attention import Gates, grid_at
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.process import FixedPasses, one_text, say_once
from lora_compose.pipelines.passes import Pass
from lora_compose.pipelines.regions import region_mask
from lora_compose.pipelines.session import Session
from lora_compose.pipelines.text.conditioning import Conditioning

Rows = Literal["cond_only", "all"]
TokenMask = Literal["tara", "all", "none"]


@dataclass(frozen=True)
class Regional:
    """Every LoRA acts in its own region; nothing moves objects into their regions.

    Attributes:
        rows: Where LoRAs act under guidance: "cond_only", the prompt's rows, or "all", the negative prompt's as well,
            as LoRAs usually do.
        token_mask: Whose keys and values of cross-attention change only at the concept's own trigger. "tara": those of
            LoRAs whose files say that they were trained with TARA; others have a part of their subject in the keys and
            values of other words. "all" or "none": of all, of none. A concept without a trigger changes them at all
            tokens, and so does a style.
    """

    rows: Rows = "cond_only"
    token_mask: TokenMask = "tara"

    def __post_init__(self) -> None:
        for name, allowed in (("rows", get_args(Rows)), ("token_mask", get_args(TokenMask))):
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
        return FixedPasses(session, [[(self.gated(session, self.text(session), masks, everywhere), 1.0)]])

    def text(self, session: Session) -> Conditioning:
        """The scene's text, with the text-encoder LoRAs of the styles."""
        concepts = session.concepts
        for loaded in concepts.loaded:
            if loaded.factors.text_encoders and not loaded.concept.is_style:
                say_once(f"the text-encoder part of {loaded.concept.name!r} is left out: text has no regions")
        return one_text(session, concepts.weights_of(concepts.styles))

    def gated(
        self, session: Session, text: Conditioning, masks: Mapping[int, Tensor], everywhere: Sequence[bool]
    ) -> Pass:
        """The pass in which LoRAs act under masks.

        Args:
            session: The call.
            text: The scene's text.
            masks: By level, the share of each concept in each cell, the same for all images or by image. Shape:
                [(images,) cells, concepts].
            everywhere: Which concepts act on the whole canvas.
        """
        concepts, canvas = session.concepts, session.canvas
        weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)[None]
        live = torch.ones(text.rows, 1, 1, device=canvas.device)
        if self.rows == "cond_only":
            live[: text.conditional_rows.start] = 0
        mask = text.trigger_mask
        named = mask.sum(dim=(0, 1)) > 0
        masked = torch.tensor([self._keeps_to_its_words(loaded) for loaded in concepts.loaded], device=canvas.device)
        tokens = torch.where(named & masked, mask, torch.ones_like(mask))
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
        return Pass(text, gates)

    def _keeps_to_its_words(self, loaded: LoadedConcept) -> bool:
        """Whether a concept has a token mask, if it has a trigger."""
        if loaded.concept.is_style or self.token_mask == "none":
            return False
        return self.token_mask == "all" or loaded.trained_with == "tara"


def region_masks(session: Session, level: int) -> Tensor:
    """The concepts' regions on the grid of a level; 1 everywhere without a region. Shape: [cells, concepts]."""
    canvas = session.canvas
    grid = grid_at(canvas.latent_grid, level)
    masks = [region_mask(concept.region, canvas.image_size, grid) for concept in session.concepts.concepts]
    return torch.stack(masks, dim=-1).flatten(0, 1).to(canvas.device)
