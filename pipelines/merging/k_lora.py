"""K-LoRA (arXiv 2502.18461): each layer takes the subject or the style, by the sum of its largest entries.

In every step the paper compares S_subject / g with S_style (1.5 t + 0.5), where S is the sum of the K = r_subject
r_style largest absolute entries of the change, t runs from 0 to 1 over the steps, and g is the mean ratio of the two
LoRAs' absolute sums over all layers; the larger wins the layer. So a layer may take the subject up to some step, and
the style afterwards.

A file has no steps. Each layer here gets the mean over them: the subject by the share of the steps that it wins, the
style by the rest. Deviations from the authors' code: alpha counts, all layers of the files take part, and layers whose
ratio is more than ten times the median or less than a tenth of it do not count in g. All entries of a change are looked
at, some rows at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, scaled, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments, check_positive

_START, _RISE = 0.5, 1.5  # the style's factor over the steps
_OUTLIER = 10.0
_MOST_ENTRIES = 2**30  # of a layer; files can have any with two thin factors, and looking at more takes minutes
_AT_ONCE = 2**24  # entries


@dataclass(frozen=True)
class KLora(Merger):
    """K-LoRA averaged over the steps, for a subject and a style in this order.

    Attributes:
        balance: Factor on the subject's side of the comparison: above 1 it wins more steps.
    """

    pair = True
    balance: float = 1.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_positive("balance", self.balance)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Compares the two over all layers first. Raises ValueError if a layer is too large."""
        ratios = (absolute_ratio(*changes) for changes in layers)
        level = mean_ratio([ratio for ratio in ratios if ratio])

        def merge(changes: Changes, moments: Moments | None) -> LoraFactors:
            subject, style = changes
            share = subject_share(subject, style, level / self.balance)
            return concatenated([scaled(subject, share), scaled(style, 1 - share)])

        return merge


def absolute_ratio(subject: LoraFactors, style: LoraFactors) -> float:
    """The sum of the subject's absolute entries over that of the style's; 0 where one does not change the layer."""
    if not subject.rank or not style.rank:
        return 0.0
    a, b = (sum(float(rows.sum(dtype=torch.float64)) for rows in _entries(change)) for change in (subject, style))
    return a / b if b else 0.0


def mean_ratio(ratios: list[float]) -> float:
    """The mean without outliers; 1 where nothing can be compared."""
    if not ratios:
        return 1.0
    middle = sorted(ratios)[len(ratios) // 2]
    kept = [ratio for ratio in ratios if middle / _OUTLIER <= ratio <= middle * _OUTLIER]
    return sum(kept) / len(kept)


def subject_share(subject: LoraFactors, style: LoraFactors, level: float) -> float:
    """The share of the steps in which the subject wins a layer; `level` is the divisor g of the subject's entries."""
    if not subject.rank or not style.rank:
        return float(subject.rank > 0)
    count = spectrum(subject).rank * spectrum(style).rank
    of_subject, of_style = (_largest(change, count) for change in (subject, style))
    if not of_style:
        return float(of_subject > 0)
    return min(1.0, max(0.0, (of_subject / level / of_style - _START) / _RISE))


def _largest(change: LoraFactors, count: int) -> float:
    largest = torch.zeros(0)
    for rows in _entries(change):
        largest = torch.cat([largest, rows.topk(min(count, len(rows))).values])
        largest = largest.topk(min(count, len(largest))).values
    return float(largest.sum(dtype=torch.float64))


def _entries(change: LoraFactors) -> Iterator[torch.Tensor]:
    """The absolute entries of a change, some rows at a time. Shape: [entries]."""
    up, down = change.scale * change.up.flatten(1).float(), change.down.flatten(1).float()
    outputs, inputs = len(up), down.shape[1]
    if outputs * inputs > _MOST_ENTRIES:
        raise ValueError(
            f"k-lora looks at every entry of a change, and one is {outputs} x {inputs}; expected at most "
            f"{_MOST_ENTRIES} entries in a layer"
        )
    for rows in up.split(max(1, _AT_ONCE // inputs)):
        yield (rows @ down).abs().flatten()
