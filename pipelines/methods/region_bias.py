"""A bias on attention scores that draws the cells of a region and the words of its subject to each other."""

from collections.abc import Mapping

from torch import Tensor

from lora_compose.attention import TextBias
from lora_compose.pipelines.text.conditioning import Conditioning


def region_bias(
    text: Conditioning,
    shares: Mapping[int, Tensor],
    phrases: Tensor,
    own_bias: float,
    other_bias: float,
    *,
    on_all_rows: bool = False,
) -> TextBias:
    """The bias on the scores between image and text (`TextBias.between`).

    Args:
        shares: By level; the same for all images, or by image. Shape: [images, cells, subjects] each.
        phrases: 1 at the words of each subject. Shape: [images, tokens, subjects].
        own_bias: Added between a region and the words of its subject.
        other_bias: Added between a region and the words of other subjects.
        on_all_rows: Whether it is there on unconditional rows, too, where it is 0 otherwise.
    """
    branches = text.rows // text.images
    words = phrases.repeat(branches, 1, 1)
    if not on_all_rows:
        words[text.roles.unconditional] = 0
    cells = {level: share.expand(text.images, -1, -1).repeat(branches, 1, 1) for level, share in shares.items()}
    return TextBias.between(cells, words, own_bias, other_bias)
