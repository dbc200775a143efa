"""A pass in which every LoRA acts in its own region, whose cells read what all cells read, or a text of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import Gates, NormRegions, Site
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import ActingRows, FixedPasses, acting_rows
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.region_texts import GatedText, SegmentedTexts
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.conditioning import Conditioning

TokenMask = Literal["tara", "all", "phrase", "others", "image", "none"]
"""The tokens that LoRAs change: of those trained with TARA their own trigger, and of others every token ("tara") or all
but the words of other subjects ("others"); of all their own trigger ("all"), or their own trigger and class word
("phrase"), no token at all ("image"), or every token ("none")."""
ChosenTokenMask = Literal["auto", TokenMask]
"""As `TokenMask`; "auto" is "others" where text and image are one sequence, and otherwise "tara"."""


def token_mask_in(canvas: Canvas, chosen: ChosenTokenMask) -> TokenMask:
    """The tokens that LoRAs change with a model."""
    if chosen != "auto":
        return chosen
    return "tara" if canvas.backbone.joint is None else "others"


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
        token_mask: The tokens that LoRAs change.
        image: Index of the image, for a pass of one image; None means all.
    """
    concepts, canvas, text = session.concepts, session.canvas, texts.text
    weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)[None]
    live = acting_rows(text, rows).to(canvas.device)
    tokens = _changed_tokens(session, text, token_mask) * texts.own
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


def _changed_tokens(session: Session, text: Conditioning, token_mask: TokenMask) -> Tensor:
    """1 at the tokens that each concept changes; a style, or a concept that is not named, changes all.

    Shape: [rows, tokens, concepts].
    """
    loaded, device = session.concepts.loaded, session.canvas.device
    subjects = torch.tensor([not each.concept.is_style for each in loaded], device=device)
    phrase, all_tokens = text.phrase_mask, torch.ones_like(text.phrase_mask)
    if token_mask == "image":
        return torch.where(subjects, 0.0, all_tokens)
    open_tokens = all_tokens
    if token_mask == "others":
        others = (phrase * subjects).sum(dim=-1, keepdim=True) - phrase
        open_tokens = torch.where(subjects, 1 - others.clamp(max=1), all_tokens)
    mask = phrase if token_mask == "phrase" else text.trigger_mask
    keeps = [
        token_mask in ("all", "phrase") or (token_mask != "none" and each.trained_with == "tara") for each in loaded
    ]
    by_image = mask[text.roles.conditional].unflatten(0, (-1, text.images)).sum(dim=(0, 2)) > 0
    named = by_image.repeat(text.rows // text.images, 1)[:, None]
    return torch.where(named & subjects & torch.tensor(keeps, device=device), mask, open_tokens)
