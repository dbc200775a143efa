"""Several texts one after the other in one sequence, as transformers read them: one for the image, one for each region.

Padding is removed, since it would cost as much as words: of region texts, and of the image's text where the model masks
it. A batch is padded to the longest text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.pipelines.text.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class Segments:
    """Texts in one sequence.

    Attributes:
        text: All of them, of all rows.
        lengths: Tokens of each on the conditional rows; the rest are padding.
        positions: Position of each of these tokens in its own text. Shape: [tokens].
        hidden: True at padding inside the texts; None if all rows have texts of equal length. Shape: [rows, tokens].
    """

    text: Conditioning
    lengths: tuple[int, ...]
    positions: Tensor
    hidden: Tensor | None

    def of(self, n: int) -> slice:
        """The tokens of text n."""
        start = sum(self.lengths[:n])
        return slice(start, start + self.lengths[n])


def join_segments(
    base: Conditioning, regions: Sequence[Conditioning], multiple: int = 1, *, hides_padding: bool = False
) -> Segments:
    """Joins texts of the same rows; unconditional rows have the base text only.

    Args:
        base: Text 0, with the inputs for the whole image (pooled text).
        regions: The text of each region.
        multiple: The model pads a text to a multiple of so many tokens.
        hides_padding: Whether the model sees no token that the mask of the text leaves out.
    """
    ragged = base.added is not None and "lengths" in base.added
    conditional, unconditional = base.roles.conditional, base.roles.unconditional
    own = torch.arange(base.prompt_embeds.shape[1], device=base.prompt_embeds.device)  # of unconditional rows
    if hides_padding:
        own = _real(base.text_mask)
    kept = [_real(text.text_mask[conditional]) for text in regions]
    kept = [_real(base.text_mask[conditional]) if ragged else own, *kept]
    texts = [base, *regions]
    lengths = tuple(map(len, kept))
    width = max(-(-sum(lengths) // multiple) * multiple, len(own))

    def joined(of: Sequence[Tensor]) -> Tensor:
        """Rows of all texts. Shape: [rows, tokens, ...]."""
        rows = of[0].new_zeros(base.rows, width, *of[0].shape[2:])
        rows[unconditional, : len(own)] = of[0][unconditional][:, own]
        parts = [values[conditional][:, indices] for values, indices in zip(of, kept, strict=True)]
        rows[conditional, : sum(lengths)] = torch.cat(parts, dim=1)
        return rows

    masks = [text.text_mask for text in texts]
    positions = [torch.arange(mask.shape[1], device=mask.device).expand(mask.shape) for mask in masks]
    mask = joined(masks)
    added = dict(base.added or {})
    if "text_mask" in added:
        added["text_mask"] = mask.to(added["text_mask"].dtype)  # a model may add numbers
    added["text_positions"] = joined(positions)  # each text begins at 0
    if ragged:
        added["lengths"] = added["lengths"].clone()
        added["lengths"][conditional] = sum(lengths)
    if "read" in added:  # by region attention, but for what an unconditional row has less than text 0
        added["read"] = torch.where(added["read"] < lengths[0], added["read"], width)
        added["read"][conditional] = width
    hidden = ~mask
    hidden[unconditional] = False
    hidden[:, sum(lengths) :] = False
    if not ragged and "read" not in added:
        hidden[:, : lengths[0]] = False  # its padding is for the model to mask or to read
    text = replace(
        base,
        prompt_embeds=joined([text.prompt_embeds for text in texts]),
        trigger_mask=joined([text.trigger_mask for text in texts]),
        phrase_mask=joined([text.phrase_mask for text in texts]),
        added=added,
    )
    return Segments(text, lengths, torch.cat(kept), hidden if bool(hidden.any()) else None)


def _real(mask: Tensor) -> Tensor:
    """Indices of the tokens that are not padding in at least one row."""
    return mask.any(dim=0).nonzero()[:, 0]
