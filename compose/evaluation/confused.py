"""Confusion matrices of stored images, ready for tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lora_compose.compose.evaluation.confusion import OUTCOMES, Outcome, gained, limits, lost, outcomes
from lora_compose.compose.evaluation.shots import Shot

SHARES = tuple(f"share_{kind}" for kind in OUTCOMES)
"""Columns of images: which share of the subjects had which outcome."""
CONFUSION = (*SHARES, "lost", "gained")
CELLS = ("similarity", "truth", "difference", "limit")


@dataclass(frozen=True, eq=False)
class Confused:
    """The confusion matrices of an image and of the references, the limits, and the outcome of each subject."""

    shot: Shot
    slots: np.ndarray
    truth: np.ndarray
    limit: np.ndarray
    outcomes: list[Outcome]

    @classmethod
    def of(cls, shot: Shot, thresholds: pd.DataFrame) -> "Confused | None":
        """The matrix of an image; None if an older version scored it. `thresholds` are those of `Evaluation`."""
        truth = shot.true
        if truth is None:
            return None
        by_name = thresholds.set_index("concept").reindex(shot.names)
        limit = limits(truth, by_name["threshold"].to_numpy(float), by_name["alone"].to_numpy(float))
        return cls(shot, shot.slots, truth, limit, outcomes(shot.slots, truth, limit))

    def subjects(self) -> Iterator[dict[str, str | None]]:
        """The outcome of each subject: the columns `outcome` and `took` of concepts."""
        for outcome in self.outcomes:
            yield {"outcome": outcome.kind, "took": None if outcome.other is None else self.shot.names[outcome.other]}

    def image(self) -> dict[str, float]:
        """The columns `CONFUSION` of images."""
        kinds = [outcome.kind for outcome in self.outcomes]
        shares = {f"share_{kind}": kinds.count(kind) / len(kinds) if kinds else np.nan for kind in OUTCOMES}
        return {**shares, "lost": lost(self.slots, self.truth), "gained": gained(self.slots, self.truth)}

    def cells(self) -> Iterator[dict[str, Any]]:
        """A row per cell: the crop of which concept, compared with the references of which."""
        names = self.shot.names
        for i, j in product(range(len(names)), repeat=2):
            difference = round(self.slots[i, j] - self.truth[i, j], 5)  # stored similarities have five digits
            values = self.slots[i, j], self.truth[i, j], difference, self.limit[i, j]
            yield {
                **self.shot.keys,
                "concept": names[i],
                "reference": names[j],
                **dict(zip(CELLS, values, strict=True)),
            }


def mean_matrix(cells: pd.DataFrame, names: list[str], value: str) -> np.ndarray:
    """A value of cells, averaged over images; NaN where there is none. Shape: [names, names]."""
    means = cells.pivot_table(index="concept", columns="reference", values=value, aggfunc="mean")
    return means.reindex(index=names, columns=names).to_numpy(float)
