"""LoRA-LEGO (arXiv 2409.16167): ranks of all LoRAs as units, clustered; each cluster becomes one rank.

The paper takes column j of B and row j of A as a unit and clusters the pairs with k-means. What these are depends on
the factors. Units here are the singular triples of each LoRA, s u v^T, which do not. k-means acts on them as matrices
of rank one: its distances need inner products alone, <s u v^T, t x y^T> = s t (u.x)(v.y), in which the sign that u
and v share cancels. A cluster's direction is the leading singular pair of the sum of its units.

Dual reweighting: averaging shortens, so a cluster gets the mean of its units' singular values (parameter reweighting);
and k ranks in place of the r that one LoRA has change the size of the output, so all is multiplied by sqrt(r / k), r
the mean rank of the LoRAs (output reweighting).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import TINY
from lora_compose.pipelines.merging.factors import Spectrum, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, check_positive, check_share

_STARTS, _ROUNDS = 10, 100


@dataclass(frozen=True)
class Lego(Merger):
    """LoRA-LEGO.

    Attributes:
        k: How many ranks the result has; None is the largest rank of the LoRAs, layer by layer. "auto" joins only units
            of different LoRAs that are alike, and multiplies nothing: without such units it is `cat`.
        alike: Least cosine at which "auto" joins two units.
        output: Whether to apply output reweighting; "auto" needs none.
    """

    k: int | Literal["auto"] | None = None
    alike: float = 0.5
    output: bool = True

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.k not in (None, "auto"):
            check_positive("k", self.k, int)
        check_share("alike", self.alike)
        if not isinstance(self.output, bool):
            raise ValueError(f"output must be true or false, not {self.output!r}")

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return lambda changes, moments: lego(changes, self.k, self.alike, self.output)


def lego(changes: Changes, k: int | Literal["auto"] | None, alike: float, output: bool) -> LoraFactors:
    """Clusters the units of all changes, and makes one rank of each cluster."""
    spectra = [spectrum(change) for change in changes]
    ranks = [change.rank for change in spectra if change.rank]
    u, v = (torch.cat([getattr(change, side) for change in spectra], dim=1) for side in "uv")
    values = torch.cat([change.values for change in spectra])
    order = values.argsort(descending=True)  # so that the order of the LoRAs does not matter to k-means
    pooled = Spectrum(u[:, order], values[order], v[:, order])
    cosines = (pooled.u.T @ pooled.u) * (pooled.v.T @ pooled.v)
    if k == "auto":
        repeats = torch.tensor([change.rank for change in spectra])
        file_of = torch.repeat_interleave(torch.arange(len(spectra)), repeats)[order]
        labels = joined((cosines > alike) & (file_of[:, None] != file_of))
    else:
        labels = k_means(pooled.values[:, None] * cosines * pooled.values, k or max(ranks, default=0))
    merged = _centroids(pooled, labels)
    if k == "auto" or not output or not merged.rank:
        return merged.factors()
    grown = (sum(ranks) / len(ranks) / merged.rank) ** 0.5
    return Spectrum(merged.u, merged.values * grown, merged.v).factors()


def joined(edges: Tensor) -> Tensor:
    """Labels of the connected parts of a graph, by its symmetric edges. Shape: [units, units], bool."""
    labels = torch.arange(len(edges))
    for i, j in edges.nonzero().tolist():
        labels[labels == labels[i]] = labels[j].clone()
    return labels


def k_means(products: Tensor, k: int) -> Tensor:
    """The cluster of each unit by inner products [units, units]: the best of ten seeded starts (k-means++)."""
    if k >= len(products):
        return torch.arange(len(products))
    generator = torch.Generator().manual_seed(0)
    clusterings = [_clustered(products, k, generator) for _ in range(_STARTS)]
    return min(clusterings, key=lambda clustering: clustering[0])[1]


def _clustered(products: Tensor, k: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """The sum of squared distances to the centroids, and the labels."""
    squares = products.diagonal()
    first = int(torch.randint(len(products), (1,), generator=generator))
    chosen = [first]
    nearest = (squares + squares[first] - 2 * products[first]).clamp(min=0)
    while len(chosen) < k:
        drawn = int(torch.multinomial(nearest + squares.max() * 1e-12, 1, generator=generator))
        chosen.append(drawn)
        nearest = torch.minimum(nearest, (squares + squares[drawn] - 2 * products[drawn]).clamp(min=0))
    distances = squares[:, None] + squares[chosen] - 2 * products[:, chosen]
    labels = distances.argmin(1)
    for _ in range(_ROUNDS):
        member = torch.nn.functional.one_hot(labels, k).to(products)
        member = member / member.sum(0).clamp(min=1)
        across = products @ member
        distances = squares[:, None] + (member * across).sum(0) - 2 * across
        distances[:, member.sum(0) == 0] = torch.inf  # a cluster that lost all its units stays empty
        if torch.equal(labels, new := distances.argmin(1)):
            break
        labels = new
    return float(distances.gather(1, labels[:, None]).sum()), labels


def _centroids(pooled: Spectrum, labels: Tensor) -> Spectrum:
    """One unit for each cluster: the direction of its sum, as long as its members are on average."""
    us, lengths, vs = [], [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        u, values, v = pooled.u[:, members], pooled.values[members], pooled.v[:, members]
        if len(members) > 1:
            direction = spectrum(LoraFactors(v.T, u * values))
            if not direction.rank or direction.values[0] < TINY * values.sum():  # they cancel out
                continue
            u, v = direction.u, direction.v
        us.append(u[:, 0])
        lengths.append(values.mean())
        vs.append(v[:, 0])
    if not us:
        return Spectrum(pooled.u[:, :0], pooled.values[:0], pooled.v[:, :0])
    order = torch.stack(lengths).argsort(descending=True)
    return Spectrum(torch.stack(us, 1)[:, order], torch.stack(lengths)[order], torch.stack(vs, 1)[:, order])
