"""Failures in the images of a method: counts by kind of failure and kind of scene, and a sheet of examples."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.table import Table

from lora_compose.compose.evaluation.summary import kind_of_scene
from lora_compose.compose.evaluation.table import Evaluation, load
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import read_pixels, save_image
from lora_compose.compose.support.terminal import echo, out

KINDS = {
    "missing": "a subject was not detected",
    "mixed": "a subject resembles another subject's references more than its own",
    "weak": "a subject does not resemble its references enough",
    "bystander": "a bystander was not detected, or has the identity of a concept",
}
"""Kinds of failure. An image that fails in several ways counts for the first of them."""

_EXAMPLES = 6


def show_failures(folder: Path, method: str, to: Path | None = None) -> None:
    """Prints how a method's images fail, by kind of scene, and writes a sheet; raises ValueError without images."""
    evaluation = load(folder)
    images = kinds_of_failure(evaluation, method)
    if images.empty:
        names = ", ".join(dict.fromkeys(evaluation.images["arm"]))
        raise ValueError(f"the evaluation in {folder} has no images of {method!r}; it has those of {names or 'none'}")
    out.print(_table(images, method))
    rows = list(_examples(images, folder))
    if not rows:
        echo("No image failed.")
        return
    columns = [()] * max(len(row.images) for row in rows)
    drawn = sheet(
        columns, rows, title=f"Failures of {method}", lines=[f"{evaluation.suite.name}, examples by kind"], side=160
    )
    echo(save_image(drawn, to or folder / f"failures-{re.sub(r'[^a-z0-9]+', '-', method.lower())}.png"))


def kinds_of_failure(evaluation: Evaluation, method: str) -> pd.DataFrame:
    """The images of a method with two further columns: the kind of scene, and the kind of failure or ""."""
    concepts = evaluation.concepts[evaluation.concepts["arm"] == method].fillna({"alone": ""})
    keys = ["scene", "alone", "seed"]
    missing = ~concepts["found"].astype(bool)
    mixed = ~missing & (concepts["own"] <= concepts["other"])
    weak = ~missing & ~mixed & (concepts["own"] < concepts["threshold"])
    marks = pd.DataFrame(concepts[keys]).assign(missing=missing, mixed=mixed, weak=weak)
    of_image = marks.groupby(keys, sort=False)[["missing", "mixed", "weak"]].any().reset_index()
    images = evaluation.arm(method).fillna({"alone": ""}).merge(of_image, on=keys)
    images["bystander"] = images["bystanders"] < 1
    failure = pd.Series("", index=images.index)
    for kind in reversed(KINDS):
        failure = failure.mask(images[kind].astype(bool), kind)
    kinds = {str(scene.name): kind_of_scene(evaluation.suite, scene) for scene in evaluation.suite.scenes}
    return images.assign(kind=[kinds[str(scene)] for scene in images["scene"]], failure=failure)


def _table(images: pd.DataFrame, method: str) -> Table:
    table = Table(
        title=f"{method}: share of images", caption="; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
    )
    for column in ("scenes", "images", "success", *KINDS, "extra objects"):
        table.add_column(column, justify="left" if column == "scenes" else "right")
    groups = [(str(kind), part) for kind, part in images.groupby("kind", sort=True)]
    for kind, part in [*groups, ("all", images)]:
        shares = [part["success"].mean(), *((part["failure"] == name).mean() for name in KINDS), part["extra"].mean()]
        table.add_row(kind, str(len(part)), *(f"{share:.2f}" for share in shares))
    return table


def _examples(images: pd.DataFrame, folder: Path) -> Iterator[Row]:
    """A row of examples of each kind, from different scenes as far as possible."""
    for kind, text in KINDS.items():
        failed = images[images["failure"] == kind]
        turn = failed.groupby("scene", sort=False).cumcount()
        chosen = failed.assign(turn=turn).sort_values("turn", kind="stable").head(_EXAMPLES)
        if len(chosen):
            pictures = [read_pixels(folder / str(file)) for file in chosen["file"]]
            label = (f"{kind}: {len(failed)} of {len(images)}", *textwrap.wrap(text, 26))
            yield Row(label, pictures, [str(scene) for scene in chosen["scene"]], parted=True)
