"""A pass in which every LoRA acts in its own region, whose cells read what all cells read, or a text of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import Gates, NormRegions, Site
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import ActingRows, FixedPasses, acting_rows
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.region_texts import GatedText, SegmentedTexts
from lora_compose.pipelines.text.conditioning import Conditioning

TokenMask = Literal["tara", "all", "none"]
"""The LoRAs that change keys and values of cross-attention only at their own trigger."""


def gated_pass(
    session: Session,
    texts: GatedText,
    masks: Mapping[int, Tensor],
    everywhere: Sequence[bool],
    *,
    rows: ActingRows = "cond_only",
    token_mask: TokenMask = "tara",
    image: int | None = None,
) -> Pass:
    """A pass in which LoRAs act under masks.

    Args:
        masks: By level, the share of each concept in each cell, by image, or one for all. Shape: [images or 1, cells,
            concepts].
        everywhere: True for concepts that act on the whole canvas.
        rows: Where LoRAs act under guidance.
        token_mask: The concepts that act on their own trigger only.
        image: Index of the image, for a pass of one image; None means all.
    """
    concepts, canvas, text = session.concepts, session.canvas, texts.text
    weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)[None]
    live = acting_rows(text, rows).to(canvas.device)
    mask = text.trigger_mask
    named = mask.sum(dim=(0, 1)) > 0
    masked = torch.tensor([_keeps_to_its_words(loaded, token_mask) for loaded in concepts.loaded], device=canvas.device)
    tokens = torch.where(named & masked, mask, torch.ones_like(mask)) * texts.own
    by_row = {
        level: mask if len(mask) == 1 else mask.repeat(text.rows // text.images, 1, 1) for level, mask in masks.items()
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
    return Pass(text, gates, joint_regions=texts.regions, image=image)


def with_region_norm(
    session: Session,
    spec: Pass,
    masks: Mapping[int, Tensor],
    everywhere: Sequence[bool],
    part: float,
    text_for_callbacks: Conditioning | None = None,
) -> FixedPasses:
    """As `gated_pass`, with group normalisation by region in a part of the steps, from the first."""
    canvas, weights = session.canvas, session.concepts.weights
    here = [i for i, (whole, weight) in enumerate(zip(everywhere, weights, strict=True)) if weight and not whole]
    if part == 0 or not here or not canvas.backbone.has_group_norms:
        return FixedPasses(session, [[(spec, 1.0)]], text_for_callbacks=text_for_callbacks)
    early = replace(spec, norm_regions=NormRegions.by_level(masks, canvas.latent_grid, here))
    turns = [[(early, 1.0)], [(spec, 1.0)]]
    return FixedPasses(session, turns, first=part, text_for_callbacks=text_for_callbacks)


def isolated_at_first(
    session: Session,
    texts: SegmentedTexts,
    cells: Tensor,
    joint: Site,
    pass_of: Callable[[GatedText], Pass],
    part: float,
) -> FixedPasses:
    """The process of one pass with texts of regions, which are isolated in a part of the steps, from the first.

    `cells` and `joint` are as for `SegmentedTexts.read_in`; `pass_of` makes the pass that reads a text.
    """
    canvas = session.canvas
    read = partial(texts.read_in, cells, joint, hides_padding=canvas.backbone.hides_padding, device=canvas.device)
    if part in (0, 1):
        only = pass_of(read(isolate=part == 1))
        return FixedPasses(session, [[(only, 1.0)]], text_for_callbacks=texts.base)
    turns = [[(pass_of(read(isolate=isolated)), 1.0)] for isolated in (True, False)]
    return FixedPasses(session, turns, first=part, text_for_callbacks=texts.base)


def _keeps_to_its_words(loaded: LoadedConcept, token_mask: TokenMask) -> bool:
    """Whether a concept with a trigger gets a token mask."""
    if loaded.concept.is_style or token_mask == "none":
        return False
    return token_mask == "all" or loaded.trained_with == "tara"
