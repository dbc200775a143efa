"""A bias on cross-attention that draws the cells of a region to the words of its subject."""

from torch import Tensor

from lora_compose.pipelines.text.conditioning import Conditioning


def region_bias(
    text: Conditioning, shares: Tensor, phrases: Tensor, own: float, other: float, *, on_all_rows: bool = False
) -> Tensor:
    """What is added to the scores of cross-attention on one grid.

    For cell x with the share M_i(x) in the region of subject i, and token t of the words of subject j, it is the sum of
    own * M_j(x) and other * M_i(x) over all i other than j. FreeFuse, arXiv 2510.23515.

    Args:
        shares: The same for all images, or by image. Shape: [images, cells, subjects].
        phrases: 1 at the words of each subject. Shape: [images, tokens, subjects].
        own: Added between a region and the words of its subject.
        other: Added between a region and the words of other subjects.
        on_all_rows: Whether it is there on unconditional rows, too, where it is 0 otherwise.

    Returns:
        Shape: [rows, cells, tokens].
    """
    others = phrases.sum(dim=2, keepdim=True) - phrases
    bias = shares @ (own * phrases + other * others).transpose(1, 2)
    if on_all_rows:
        return bias.repeat(text.rows // text.images, 1, 1)
    every = bias.new_zeros(text.rows, *bias.shape[1:])
    every[text.roles.conditional] = bias
    return every
