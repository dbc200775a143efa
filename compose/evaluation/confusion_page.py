"""The outcomes and the confusion matrices of the report, for each row."""

from typing import Any

import numpy as np
import pandas as pd

from lora_compose.compose.evaluation.confused import CELLS, mean_matrix
from lora_compose.compose.evaluation.confusion import OUTCOMES
from lora_compose.compose.evaluation.summary import role
from lora_compose.compose.evaluation.table import Evaluation

STRONGEST = 60
"""Percent of colour in the cell that is furthest from the references; with more, its number could not be read."""


def bars(arms_table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per arm that has outcomes: its parts in percent, in the order of `OUTCOMES`."""
    rows = []
    for row in arms_table.to_dict("records"):
        shares = {kind: row[f"share_{kind}"] for kind in OUTCOMES}
        if not any(np.isnan(share) for share in shares.values()):
            parts = [{"kind": kind, "share": share, "percent": round(100 * share, 2)} for kind, share in shares.items()]
            rows.append({**row, "parts": [part for part in parts if part["share"] > 0]})
    return rows


def matrices(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A matrix per arm, of the concepts that scenes have, averaged over images; its cells are row by row.

    A cell has the difference to the references, its strength of colour in percent, and what stands behind it.
    """
    cells, rows = evaluation.confusion, []
    names = [name.name for name in evaluation.suite.concepts if name.name in set(cells["concept"])]
    by_arm = cells.groupby("arm", sort=False)
    values = {str(arm): {key: mean_matrix(part, names, key) for key in CELLS} for arm, part in by_arm}
    largest = max((np.nanmax(abs(of["difference"]), initial=0.0) for of in values.values()), default=0.0)
    for arm, of in values.items():
        strength = STRONGEST * abs(of["difference"]) / (largest or 1.0)
        table = [
            [
                {"concept": name, "reference": other, "own": i == j, "strength": round(float(strength[i, j]), 1)}
                | {key: float(value[i, j]) for key, value in of.items()}
                for j, other in enumerate(names)
            ]
            for i, name in enumerate(names)
        ]
        rows.append({"arm": arm, "role": role(evaluation.suite, arm), "names": names, "table": table})
    return rows
