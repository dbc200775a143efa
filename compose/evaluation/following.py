"""How well each metric follows the eye: numbers of an evaluation against votes on its images."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table

from lora_compose.compose.evaluation.blind import VERDICTS, read_votes
from lora_compose.compose.evaluation.blind_sheets import read_files
from lora_compose.compose.evaluation.statistics import Interval
from lora_compose.compose.evaluation.summary import METRICS, OUTCOME_METRICS
from lora_compose.compose.evaluation.table import load
from lora_compose.compose.support.terminal import echo, out

_ORDER = tuple(reversed(VERDICTS))  # from the worst to the best


def show_following(votes: Path, folder: Path) -> None:
    """Prints how well each metric follows the votes on images of an evaluation, the best first.

    Raises:
        ValueError: If the votes are not on images of this evaluation, or all of them are the same.
        FileError: If there is no evaluation, or a file is damaged.
    """
    found = following(votes, folder)
    table = Table(
        title=f"How well metrics follow {found['images'].to_numpy().max()} votes",
        caption="Of two images that were voted differently, how often the better one has the better number; ties count "
        "half, so 0.5 is chance. In brackets 95 %, over scenes and seeds.",
    )
    for column in ("metric", "follows", "", "images"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in found.to_dict("records"):
        interval = f"({row['low']:.2f} … {row['high']:.2f})"
        table.add_row(row["title"], f"{row['follows']:.2f}", interval, str(row["images"]))
    out.print(table)
    echo("The number to read is the one that follows best. Two whose intervals overlap may be equally good.")


def following(votes: Path, folder: Path) -> pd.DataFrame:
    """A row per metric, the best first: `metric`, `title`, `follows` with `low` and `high`, and `images`.

    Raises:
        ValueError: If the votes are not on images of this evaluation, or all of them are the same.
        FileError: If there is no evaluation, or a file is damaged.
    """
    verdicts, files = read_votes(votes)[1], read_files(votes)
    images = load(folder).images.set_index("file")
    if lost := [file for file in files.values() if file not in images.index]:
        raise ValueError(f"{votes} has votes on {lost[0]}, which is no scored image of the evaluation in {folder}")
    voted = images.loc[[files[number] for number in verdicts]]
    eye = [_ORDER.index(verdict) for verdict in verdicts.values()]
    if len(set(eye)) < 2:
        raise ValueError(f"all votes in {votes} are the same, so no number can follow them")
    groups = list(zip(voted["scene"], voted["seed"], strict=True))
    rows = []
    for metric in (*METRICS, *OUTCOME_METRICS):
        values = voted[metric.key].to_numpy(float) * (1 if metric.higher_is_better else -1)
        if (there := ~np.isnan(values)).any():
            kept = np.flatnonzero(there)
            found = follows(values[kept], [eye[i] for i in kept], [groups[i] for i in kept])
            ends = {"follows": found.mean, "low": found.low, "high": found.high, "images": len(kept)}
            rows.append({"metric": metric.key, "title": metric.title, **ends})
    return pd.DataFrame(rows).sort_values("follows", ascending=False, kind="stable").reset_index(drop=True)


def follows(
    values: Sequence[float] | np.ndarray,
    votes: Sequence[int],
    groups: Sequence[Hashable],
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """How often the better-voted of two items has the higher value.

    Ties of values count half, so 0.5 is chance, 1 is perfect and 0 is perfectly wrong. NaN if all votes are the same.
    The interval of 95 % draws whole groups with replacement; items of a group are alike. (Somers' D of the values,
    given the votes, is twice this less 1.)
    """
    value, vote = np.asarray(values, dtype=float), np.asarray(votes)
    better = (vote[:, None] > vote[None]).astype(float)
    right = better * (0.5 + 0.5 * np.sign(value[:, None] - value[None]))
    names = list(dict.fromkeys(groups))
    member = np.array([names.index(group) for group in groups])
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights = np.concatenate([np.ones((1, len(value))), counts[:, member]])
    pairs = np.einsum("di,ij,dj->d", weights, better, weights, optimize=True)
    wins = np.einsum("di,ij,dj->d", weights, right, weights, optimize=True)
    shares = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    drawn = shares[1:][~np.isnan(shares[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(names) > 1 and len(drawn) else (np.nan, np.nan)
    return Interval(float(shares[0]), float(low), float(high), len(names))
