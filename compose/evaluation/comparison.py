"""Comparison of two runs of an evaluation: their differences, and the effect on the metrics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_compose.compose.evaluation.report import line, marked, number
from lora_compose.compose.evaluation.statistics import MINIMUM_SCENES, compare
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.evaluation.summary import METRICS, Metric, by_scene_and_seed
from lora_compose.compose.evaluation.table import Evaluation, arm_names, load
from lora_compose.compose.support.terminal import plain

COMPARED = ("success", "region_min", "region", "leak", "swap", "clip_t")
"""Metrics that are compared if both runs measure in the same way."""

RELATIVE = ("success", "swap")
"""Metrics that are compared if runs measure in different ways. Similarities are then on different scales, but these
metrics only ask whether a concept is nearest to its own references, and above its run's own threshold."""

_SIMILARITIES_FROM = ("encoder", "detector")
_LISTS = ("concepts", "scenes", "methods", "metrics")
_UNIMPORTANT = ("name", "processes", *_LISTS)
_HEADER = ("", "metric", "A", "B", "B - A", "won / tied / lost", "")


@dataclass(frozen=True, eq=False)
class RunComparison:
    """A comparison of two runs; a rich console prints it, differences first.

    Attributes:
        a: Folder of the first run.
        b: Folder of the second run.
        notes: Differences between the runs, and their consequences.
        table: A row per arm and metric: means in `a` and `b` over the images that both have, their `difference`
            (b - a) with its interval (`low`, `high`), `wins`, `ties` and `losses` of b, and the `verdict` on b.
            Without common images the means are those of each run, and there is no difference.
    """

    a: Path
    b: Path
    notes: tuple[str, ...]
    table: pd.DataFrame

    def markdown(self) -> str:
        """The comparison as Markdown."""
        lines = [
            "# Comparison of two evaluations",
            "",
            f"- A: {marked(str(self.a))}",
            f"- B: {marked(str(self.b))}",
            "",
        ]
        lines += [f"- {marked(note)}" for note in self.notes]
        lines += ["", line(_HEADER), line(["---", "---", "---:", "---:", "---:", "---:", "---"])]
        lines += [line([marked(cell) for cell in row]) for row in self._rows()]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> Group:
        return Group(*(Text(plain(f"- {note}")) for note in self.notes), Text(), self._table())

    def _table(self) -> Table:
        table = Table(*_HEADER, box=None, pad_edge=False)
        for column in table.columns[2:6]:
            column.justify = "right"
        colours = {"B is better": "green", "B is worse": "red"}
        for row in self._rows():
            *cells, outcome = (Text(plain(cell)) for cell in row)
            outcome.stylize(colours.get(outcome.plain, "dim"))
            table.add_row(*cells, outcome)
        return table

    def _rows(self) -> Iterator[list[str]]:
        before = None
        for row in self.table.to_dict("records"):
            metric = next(measure for measure in METRICS if measure.key == row["metric"])
            yield [
                "" if row["arm"] == before else row["arm"],
                metric.title,
                number(row["a"], metric),
                number(row["b"], metric),
                _difference(row, metric),
                f"{row['wins']} / {row['ties']} / {row['losses']}" if row["images"] else "",
                _said(row),
            ]
            before = row["arm"]


def compare_runs(a: Path, b: Path) -> RunComparison:
    """Compares two runs, image by image where both have the same scene and seed.

    Scenes of the same name are the same only if their prompts, concepts and sizes are. If encoder, detector or
    reference images differ, similarities are not comparable, and only `RELATIVE` is compared. Raises FileError if a
    folder has no evaluation, or a file of it is damaged.
    """
    first, second = load(a), load(b)
    comparable = _same_scale(first.suite, second.suite)
    compared = set(COMPARED if comparable else RELATIVE)
    if _text_model(first.suite) != _text_model(second.suite):
        compared -= {"clip_t"}
    shared = _shared_scenes(first.suite, second.suite)
    rows = [
        {"arm": arm, "metric": metric.key, **_row(metric, first.arm(arm), second.arm(arm), shared)}
        for arm in arm_names(first.suite)
        if arm in arm_names(second.suite)
        for metric in METRICS
        if metric.key in compared
    ]
    columns = ["arm", "metric", "a", "b", "difference", "low", "high", "wins", "ties", "losses", "images", "verdict"]
    notes = [*_differences(first, second), *_consequences(first, second, comparable, shared)]
    return RunComparison(a, b, tuple(notes), pd.DataFrame(rows, columns=columns))


def _row(metric: Metric, a: pd.DataFrame, b: pd.DataFrame, shared: Sequence[str]) -> dict[str, Any]:
    a, b = (images.dropna(subset=[metric.key]) for images in (a, b))
    both = {key for key in set(_keys(a)) & set(_keys(b)) if key[0] in shared}
    if not both:
        means = {"a": _mean(by_scene_and_seed(a, metric.key)), "b": _mean(by_scene_and_seed(b, metric.key))}
        return {**means, "wins": 0, "ties": 0, "losses": 0, "images": 0, "verdict": ""}
    common = (pd.DataFrame(images[[key in both for key in _keys(images)]]) for images in (a, b))
    first, second = (by_scene_and_seed(images, metric.key) for images in common)
    result = compare(second, first, metric.higher_is_better)
    ends = {"difference": result.difference.mean, "low": result.difference.low, "high": result.difference.high}
    counts = {"wins": result.wins, "ties": result.ties, "losses": result.losses, "images": len(both)}
    return {"a": _mean(first), "b": _mean(second), **ends, **counts, "verdict": result.verdict}


def _keys(images: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Scene, concept that acts alone, and seed of each image."""
    alone = ["" if pd.isna(name) else str(name) for name in images["alone"]]
    return list(zip(images["scene"], alone, images["seed"], strict=True))


def _mean(values: pd.Series) -> float:
    """Over scenes, as everywhere."""
    means = np.asarray(values.groupby(level=0).mean(), dtype=float)
    return float(means.mean()) if len(means) else np.nan


# --- what differs ---


def _same_scale(a: Suite, b: Suite) -> bool:
    references = [{concept.name: concept.references for concept in suite.concepts} for suite in (a, b)]
    in_both = references[0].keys() & references[1].keys()
    same = all(references[0][name] == references[1][name] for name in in_both)
    return same and all(getattr(a, field) == getattr(b, field) for field in _SIMILARITIES_FROM)


def _text_model(suite: Suite) -> str:
    """The model that measures CLIP-T."""
    return next((metric.model for metric in suite.metrics if metric.name == "clip-t"), suite.encoder)


def _shared_scenes(a: Suite, b: Suite) -> list[str]:
    """Scenes that are equal in both, ignoring their boxes."""
    fields = ("prompt", "negative_prompt", "concepts", "bystanders", "width", "height")
    others = {scene.name: scene for scene in b.scenes}
    return [
        scene.name
        for scene in a.scenes
        if scene.name in others and all(getattr(scene, f) == getattr(others[scene.name], f) for f in fields)
    ]


def _differences(a: Evaluation, b: Evaluation) -> Iterator[str]:
    first, second = (evaluation.suite.model_dump(mode="json") for evaluation in (a, b))
    yield from _changed("", {k: first[k] for k in first if k not in _UNIMPORTANT}, second)
    for field in _LISTS:
        yield from _changed_entries(field.removesuffix("s"), getattr(a.suite, field), getattr(b.suite, field))
    versions = [{k: v for made in evaluation.made for k, v in made.versions.items()} for evaluation in (a, b)]
    names = sorted(versions[0].keys() | versions[1].keys())
    yield from _changed("version of ", {name: versions[0].get(name) for name in names}, versions[1])
    machines = [", ".join(dict.fromkeys(made.machine.name for made in evaluation.made)) for evaluation in (a, b)]
    yield from _changed("", {"machine": machines[0]}, {"machine": machines[1]})


def _changed_entries(kind: str, a: Iterable[Any], b: Iterable[Any]) -> Iterator[str]:
    """Differences between two lists of named entries."""
    first, second = ({entry.name: entry for entry in entries} for entries in (a, b))
    for run, here, there in (("A", first, second), ("B", second, first)):
        if only := [name for name in here if name not in there]:
            yield f"only in {run}: {kind} {', '.join(map(repr, only))}"
    for name in (name for name in first if name in second):
        both = (entries[name].model_dump(mode="json") for entries in (first, second))
        yield from _changed(f"{kind} {name!r}, ", *both)


def _changed(where: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for field, value in a.items():
        if value != b.get(field):
            yield f"{where}{field.replace('_', ' ')}: {value} in A, {b.get(field)} in B"


def _consequences(a: Evaluation, b: Evaluation, comparable: bool, shared: Sequence[str]) -> Iterator[str]:
    if not comparable:
        yield (
            "encoder, detector or references differ: similarities are not comparable, and are left out; each run "
            "decides on success by thresholds of its own"
        )
    names = {scene.name for scene in b.suite.scenes}
    if changed := [s.name for s in a.suite.scenes if s.name in names and s.name not in shared]:
        yield f"not the same scene in spite of the name, and left out: {', '.join(map(repr, changed))}"
    if len(shared) < MINIMUM_SCENES:
        yield f"scenes in both: {len(shared)}; there is no verdict with fewer than {MINIMUM_SCENES}"
    if unrecognised := sorted({*a.unrecognised, *b.unrecognised}):
        yield f"the encoder cannot recognise {', '.join(unrecognised)} in at least one of the runs"


def _difference(row: Mapping[str, Any], metric: Metric) -> str:
    if pd.isna(row["difference"]):
        return ""
    ends = "" if pd.isna(row["low"]) else f" ({number(row['low'], metric)} … {number(row['high'], metric)})"
    return number(row["difference"], metric, sign=True) + ends


def _said(row: Mapping[str, Any]) -> str:
    if not row["images"]:
        return "no common images"
    return "undecided" if row["verdict"] == "undecided" else f"B is {row['verdict']}"
