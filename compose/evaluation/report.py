"""The report of an evaluation: a self-contained HTML page, Markdown, and tables for pandas."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_compose.compose.evaluation.batches import Arm, arms
from lora_compose.compose.evaluation.confusion import OUTCOMES
from lora_compose.compose.evaluation.confusion_page import bars, matrices
from lora_compose.compose.evaluation.gallery import SMALL_SIDE, Gallery, shrunk
from lora_compose.compose.evaluation.plots import against_cost
from lora_compose.compose.evaluation.results import Failed
from lora_compose.compose.evaluation.scoring import reference_crops
from lora_compose.compose.evaluation.statistics import MINIMUM_SCENES
from lora_compose.compose.evaluation.suite import SuiteScene, ZeroShotConfig
from lora_compose.compose.evaluation.summary import (
    MAIN,
    METRICS,
    OUTCOME_METRICS,
    Metric,
    role,
    success_by_kind,
    summary,
)
from lora_compose.compose.evaluation.table import Evaluation, load
from lora_compose.compose.files.stored import write_text
from lora_compose.compose.support.terminal import plain

_REFERENCES = 4
_OPEN_SCENES = 3
_GLANCE = 4
_DASH = "\u2013"


class Report(NamedTuple):
    """The files of a written report: the page, the table as Markdown, and CSV or JSON of the tables."""

    html: Path
    markdown: Path
    images: Path
    concepts: Path
    confusion: Path
    summary: Path


def write_report(out: Path, baseline: str | None = None) -> Report:
    """Writes the report of an evaluation, as far as it is finished, into its folder.

    report.html (images inside), report.md, images.csv, concepts.csv, confusion.csv (a row per cell of the confusion
    matrix of each image) and summary.json; each appears whole or not at all.
    Methods are compared with `baseline`, by default the suite's. The same results give the same files.

    Raises:
        ValueError: If there is no such method.
        FileError: If there is no evaluation in the folder, or a file of it is damaged.
        OSError: If a file cannot be written.
    """
    evaluation = load(out) if baseline is None else load(out).against(baseline)
    arms_table = summary(evaluation)
    names = ("report.html", "report.md", "images.csv", "concepts.csv", "confusion.csv", "summary.json")
    report = Report(*(out / name for name in names))
    write_text(report.html, render_html(out, evaluation, arms_table))
    write_text(report.markdown, render_markdown(evaluation, arms_table))
    tables = (evaluation.images, evaluation.concepts, evaluation.confusion)
    for path, table in zip((report.images, report.concepts, report.confusion), tables, strict=True):
        write_text(path, str(table.to_csv(index=False, lineterminator="\n")))
    write_text(report.summary, f"{arms_table.to_json(orient='records', indent=1, double_precision=15)}\n")
    return report


def render_html(out: Path, evaluation: Evaluation, arms_table: pd.DataFrame) -> str:
    """The page. `arms_table` is what `summary.summary` gives."""
    environment = Environment(
        loader=PackageLoader("lora_compose.compose.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"plain": plain, "number": number, "bytes": _bytes, "amount": _amount}
    environment.globals |= {"verdict": verdict}
    gallery = Gallery(out, evaluation)
    concepts = _concepts(evaluation)
    plots = [Markup(against_cost(arms_table, metric)) for metric in METRICS if metric.key in ("success", "region_min")]
    return environment.get_template("report.html.j2").render(
        suite=evaluation.suite,
        facts=facts(evaluation),
        warnings=warnings(evaluation),
        metrics=_measured(arms_table),
        glance=_glance(evaluation, gallery, {row["concept"]: row["images"][:1] for row in concepts}),
        outcomes=OUTCOMES,
        outcome_metrics=OUTCOME_METRICS,
        bars=bars(arms_table),
        matrices=matrices(evaluation),
        main=MAIN,
        rows=arms_table.to_dict("records"),
        plots=[plot for plot in plots if plot],
        concepts=concepts,
        bounds=_bounds_rows(evaluation),
        scene_kinds=_scene_kinds(evaluation),
        scenes=[_scene(evaluation, gallery, scene) for scene in evaluation.suite.scenes],
        open_scenes=_OPEN_SCENES,
        cases=_cases(evaluation, gallery),
        failed=evaluation.failed,
        many=gallery.many,
        side=gallery.side,
    )


def _measured(arms_table: pd.DataFrame) -> list[Metric]:
    """The metrics that at least one row has."""
    return [metric for metric in METRICS if not np.isnan(arms_table[metric.key].to_numpy(dtype=float)).all()]


# --- words ---


def facts(evaluation: Evaluation) -> dict[str, str]:
    """The circumstances of the evaluation, for the reader."""
    suite = evaluation.suite
    detector = suite.detector
    found_by = "none, the scenes' regions are cut out" if detector is None else detector.kind
    found_by += f", {detector.model}" if isinstance(detector, ZeroShotConfig) else ""
    versions = _distinct(", ".join(f"{k} {v}" for k, v in sorted(made.versions.items())) for made in evaluation.made)
    machines = _distinct(
        f"{m.machine.name} ({m.machine.device}, {_count(m.machine.threads, 'thread')})" for m in evaluation.made
    )
    batches, failed = len(evaluation.plan.batches), len(evaluation.failed)
    return {
        "Model": suite.model,
        "Encoder": suite.encoder,
        "Further metrics": ", ".join(f"{metric.name} ({metric.model})" for metric in suite.metrics) or "none",
        "Detector": found_by,
        "Steps": str(suite.steps),
        "Guidance": f"{suite.guidance_scale:g}",
        "Scheduler": suite.scheduler or "the model's own",
        "Precision": suite.dtype,
        "Seeds": ", ".join(map(str, suite.seeds)),
        "Scenes": str(len(suite.scenes)),
        "Images": f"{len(evaluation.images)} with scores, {evaluation.unscored} without",
        "Batches": f"{batches} planned, {failed} failed, {evaluation.missing} not made yet",
        "Versions": "; or ".join(versions) or "unknown",
        "Machine": "; or ".join(machines) or "unknown",
    }


def warnings(evaluation: Evaluation) -> list[str]:
    """Warnings about the results, for the reader."""
    texts = [
        f"The encoder cannot recognise {name}: with its LoRA alone, images are no more alike to its references than "
        "without any LoRA. Its similarity says nothing about its identity, and success only asks whether its own "
        "references are the nearest."
        for name in evaluation.unrecognised
    ]
    if unmeasured := evaluation.unmeasured:
        texts.append(
            f"No threshold for {', '.join(unmeasured)}: not found without LoRA, or not with the LoRA alone. Success "
            "only asks whether their own references are the nearest."
        )
    if unlimited := [f"{word} beside {concept}" for word, concept in evaluation.unlimited]:
        texts.append(
            f"No limit for bystanders: {', '.join(unlimited)}. Without LoRAs the bystander was not found, or looks as "
            "much like the concept as its LoRA alone does. Success only asks whether it is there."
        )
    if (scenes := len(set(evaluation.images["scene"]))) < MINIMUM_SCENES:
        texts.append(
            f"{_count(scenes, 'scene')}: intervals of so few say little about other scenes, and there is no verdict "
            f"with fewer than {MINIMUM_SCENES}. More seeds do not help, more scenes do."
        )
    if len(_distinct(str(sorted(made.versions.items())) for made in evaluation.made)) > 1:
        texts.append("Images were made by different versions of the packages, so differences may be due to them.")
    if len(_distinct(str(made.machine) for made in evaluation.made)) > 1:
        texts.append("Images were made by different machines, so their seconds cannot be compared.")
    if left := evaluation.missing + len(evaluation.failed):
        texts.append(
            f"{_count(left, 'batch', 'batches')} of {len(evaluation.plan.batches)} failed or are not made yet. Means "
            "are over different images then; comparisons use only what both have."
        )
    return texts


def number(value: Any, metric: Metric | None = None, digits: int = 2, sign: bool = False) -> str:
    """A number as tables show it, with a plus if `sign`; a dash if there is none."""
    digits, plus = metric.digits if metric else digits, "+" if sign else ""
    return _DASH if value is None or pd.isna(value) else f"{value:{plus}.{digits}f}".replace("-", "\u2212")


def verdict(row: Mapping[str, Any], key: str, baseline: str) -> str:
    """The verdict on a row against the baseline; empty for rows that are not compared."""
    result = row.get(f"{key}_verdict")
    if not isinstance(result, str):
        return ""
    return result if result == "undecided" else f"{result} than {baseline}"


def _bytes(value: float) -> str:
    return _DASH if pd.isna(value) else f"{value / 2**20:.0f} MiB"


def _amount(value: float) -> str:
    """FLOPs, in the unit that fits."""
    units = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")]
    size, unit = next(((size, unit) for size, unit in units if value >= size), (1, ""))
    return _DASH if pd.isna(value) else f"{value / size:.3g} {unit}".rstrip()


def _count(count: int, singular: str, plural: str = "") -> str:
    return f"{count} {singular if count == 1 else plural or f'{singular}s'}"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# --- Markdown ---


def render_markdown(evaluation: Evaluation, arms_table: pd.DataFrame) -> str:
    """The tables as Markdown. `arms_table` is what `summary.summary` gives."""
    suite = evaluation.suite
    shown = _measured(arms_table)
    header = ["", *(f"{metric.title} {'↑' if metric.higher_is_better else '↓'}" for metric in shown)]
    header += ["latent rows", "FLOPs", "seconds", "largest memory"]
    lines = [f"# Evaluation: {marked(suite.name)}", ""]
    lines += [f"- {name}: {marked(value)}" for name, value in facts(evaluation).items()]
    lines += ["", *(f"> **Note.** {marked(text)}\n" for text in warnings(evaluation))]
    lines += _table(header, (_row(row, shown, suite.baseline) for row in arms_table.to_dict("records")))
    if outcomes := bars(arms_table):
        rows = (
            [marked(row["arm"]), *(number(row[measure.key], measure) for measure in OUTCOME_METRICS)]
            for row in outcomes
        )
        lines += ["", *_table(["", *(metric.title for metric in OUTCOME_METRICS)], rows)]
    if kinds := _scene_kinds(evaluation):
        rows = ([marked(row["arm"]), *map(number, row["values"])] for row in kinds["rows"])
        lines += ["", *_table(["Success", *kinds["columns"]], rows)]
    lines += ["", *_GUIDE]
    if evaluation.failed:
        failures = (f"- {marked(_whose(failure))}: {marked(failure.error)}" for failure in evaluation.failed)
        lines += ["", "## Failed", "", *failures]
    return "\n".join(lines) + "\n"


_GUIDE = (
    "Success: every concept is there and is itself. Worst concept, Likeness: similarity to the own references; a "
    "concept that was not found counts as 0. Leak, Nearer to another: likeness to other concepts; lower is better.  ",
    "After a mean comes its 95 % interval over scenes. A verdict against the baseline needs an interval of "
    f"the difference, on the same scenes and seeds, that excludes 0, and at least {MINIMUM_SCENES} scenes.  ",
    "The first rows are references, not methods: no LoRA, and each LoRA alone, with tara if its file says "
    "that it was trained for it, otherwise with merge. Costs are medians of an image; x1 is an image without LoRA.",
)


def _row(row: Mapping[str, Any], shown: Iterable[Metric], baseline: str) -> list[str]:
    name = marked(row["arm"]) + (" (baseline)" if row["role"] == "baseline" else "")
    cells = [f"*{name}*" if row["role"] == "sanity" else name]
    for metric in shown:
        low, high = row[f"{metric.key}_low"], row[f"{metric.key}_high"]
        interval = "" if pd.isna(low) else f" ({number(low, metric)} … {number(high, metric)})"
        words = verdict(row, metric.key, baseline)
        cells.append(number(row[metric.key], metric) + interval + (f"<br>{marked(words)}" if words else ""))
    costs = [f"{number(row['rows'], digits=0)} (x{number(row['rows_ratio'])})"]
    costs += [f"{_amount(row['flops'])} (x{number(row['flops_ratio'])})"]
    costs += [f"{number(row['seconds'])} (x{number(row['seconds_ratio'])})", _bytes(row["peak_bytes"])]
    return [*cells, *costs]


def marked(text: str) -> str:
    """Text as Markdown shows it, on one line: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(plain(text).split()), quote=False))


def line(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, with numbers in all columns but the first."""
    return [line(header), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)]


def _whose(failed: Failed) -> str:
    alone = f", {failed.alone}" if failed.alone else ""
    return f"{failed.scene}, {failed.arm}{alone}, seeds {', '.join(map(str, failed.seeds))}"


def _scene_kinds(evaluation: Evaluation) -> dict[str, Any]:
    """Mean success by kind of scene, for the tables; empty if all scenes are of one kind."""
    table = success_by_kind(evaluation)
    rows = [
        {"arm": str(arm), "role": role(evaluation.suite, str(arm)), "values": values.tolist()}
        for arm, values in table.iterrows()
    ]
    return {"columns": list(table.columns), "rows": rows} if rows else {}


# --- images with captions ---


def _scene(evaluation: Evaluation, gallery: Gallery, scene: SuiteScene) -> dict[str, Any]:
    """A scene as a grid: a row per arm, a column per seed."""
    rows = []
    for arm in arms(evaluation.suite, scene):
        cells = [
            gallery.shown(scene.name, arm.name, arm.alone, seed) or _gap(evaluation, scene, arm, seed)
            for seed in evaluation.suite.seeds
        ]
        rows.append({"arm": arm.name, "alone": arm.alone, "role": role(evaluation.suite, arm.name), "cells": cells})
    return {"name": scene.name, "prompt": scene.prompt, "rows": rows}


def _glance(evaluation: Evaluation, gallery: Gallery, references: Mapping[str, list[str]]) -> dict[str, Any]:
    """An image of each row, LoRAs alone left out, in the first scenes: what the page begins with."""
    suite = evaluation.suite
    scenes, seed = suite.scenes[:_GLANCE], suite.seeds[0]
    rows = [
        {
            "arm": arm.name,
            "role": role(suite, arm.name),
            "cells": [
                gallery.shown(scene.name, arm.name, None, seed) or _gap(evaluation, scene, arm, seed)
                for scene in scenes
            ],
        }
        for arm in arms(suite, scenes[0])
        if arm.alone is None
    ]
    shown = [
        {"name": scene.name, "prompt": scene.prompt, "references": {name: references[name] for name in scene.concepts}}
        for scene in scenes
    ]
    return {"scenes": shown, "rows": rows, "seed": seed}


def _gap(evaluation: Evaluation, scene: SuiteScene, arm: Arm, seed: int) -> str:
    """Why there is no image with scores."""
    wanted = (scene.name, arm.name, arm.alone)
    if any(seed in f.seeds and (f.scene, f.arm, f.alone) == wanted for f in evaluation.failed):
        return "failed"
    return "not there yet"


def _cases(evaluation: Evaluation, gallery: Gallery) -> list[dict[str, Any]]:
    """The best and the worst image of every method, by its worst concept."""
    cases = []
    for method in evaluation.suite.compared:
        images = evaluation.arm(method.name).to_dict("records")
        if len(images) < 2:
            continue
        for kind, choose in (("best", max), ("worst", min)):
            chosen = choose(images, key=lambda image: image["region_min"])
            shown = gallery.shown(chosen["scene"], method.name, None, chosen["seed"])
            cases.append({"kind": kind, "shown": shown, "prompt": evaluation.suite.scene(chosen["scene"]).prompt})
    return cases


def _concepts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Concepts with their references and thresholds."""
    rows = []
    for row in evaluation.thresholds.to_dict("records"):
        concept = evaluation.suite.concept(row["concept"])
        try:
            crops = reference_crops(concept)[:_REFERENCES]
        except (ValueError, OSError):
            crops = []
        note = "not recognised" if row["concept"] in evaluation.unrecognised else ""
        images = [shrunk(crop, SMALL_SIDE) for crop in crops]
        rows.append(
            {**row, "trigger": concept.trigger, "class_word": concept.class_word, "note": note, "images": images}
        )
    return rows


def _bounds_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """How alike every concept is under every arm: a row per arm."""
    rows: dict[str, dict[str, Any]] = {}
    for row in evaluation.bounds.to_dict("records"):
        rows.setdefault(row["arm"], {})[row["concept"]] = row
    return [{"arm": arm, "role": role(evaluation.suite, arm), "concepts": concepts} for arm, concepts in rows.items()]
