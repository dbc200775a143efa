"""Tables of evaluations in the docs: `python docs/results_tables.py [EVALUATION ...]`.

EVALUATION is a folder that `lora-compose evaluate` has finished; what its methods reached is kept in
`docs/results/SUITE.csv`. Then the tables of all pages are written anew from these files. A table stands between
`<!-- results: SUITE | column | column -->` and `<!-- end -->`; columns are those of `COLUMNS`, or "success, KIND" for
the scenes of a kind: pairs, one class, three, four, small, overlapping.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_compose.compose.evaluation.suite import Suite, SuiteScene
from lora_compose.compose.evaluation.summary import summary
from lora_compose.compose.evaluation.table import Evaluation, load

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "docs" / "results"
PAGES = (*sorted(DOCS.glob("**/*.md")), *sorted(ROOT.glob("assets/*/README.md")))
KINDS = {1: "one", 2: "pairs", 3: "three", 4: "four"}
KEPT = (
    "arm", "role", "images", "scenes", "success", "success_low", "success_high", "success_difference",
    "success_difference_low", "success_difference_high", "success_verdict", "region_min", "region_min_low",
    "region_min_high", "region", "leak", "found", "extra", "inside", "style", "clip_t", "clip_i", "rows_ratio",
    "flops_ratio", "seconds_ratio",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) \|(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def _number(value: Any, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _interval(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    low, high = (_number(row[f"{key}_{end}"], digits) for end in ("low", "high"))
    return f"{_number(row[key], digits)} ({low} … {high})" if low else _number(row[key], digits)


def _against(row: Mapping[str, Any]) -> str:
    if pd.isna(row["success_difference"]):
        return ""
    sign = "+" if row["success_difference"] >= 0 else ""
    return f"{row['success_verdict']}, {sign}{_interval(row, 'success_difference')}"


def _plain(key: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _number(row[key], digits)


COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "success": lambda row: _interval(row, "success"),
    "against merge": _against,
    "against draft": _against,
    "against clora": _against,
    "against lora-composer": _against,
    "worst concept": lambda row: _interval(row, "region_min"),
    "likeness": _plain("region", 2),
    "leak": _plain("leak", 2),
    "found": _plain("found", 2),
    "extra objects": _plain("extra", 2),
    "in place": _plain("inside", 2),
    "style": _plain("style", 2),
    "CLIP-T": _plain("clip_t", 1),
    "CLIP-I": _plain("clip_i", 3),
    "rows": _plain("rows_ratio", 2),
    "FLOPs": _plain("flops_ratio", 2),
    "seconds": _plain("seconds_ratio", 1),
}
"""What a cell says, by the heading of its column. Rows, FLOPs and seconds: without any LoRA = 1."""


def kept(folder: Path) -> tuple[str, pd.DataFrame]:
    """Name of the suite, and what its arms reached.

    Raises:
        ValueError: If images are missing or a batch has failed.
    """
    evaluation = load(folder)
    if evaluation.missing or evaluation.unscored or evaluation.failed:
        raise ValueError(f"{folder} is not finished: run lora-compose evaluate again")
    found = summary(evaluation).filter([*KEPT])
    return evaluation.suite.name, found.assign(**_by_kind(evaluation, found["arm"].tolist()))


def _by_kind(evaluation: Evaluation, arms: Sequence[str]) -> dict[str, list[float]]:
    """Success by kind of scene, for each arm."""
    kinds = {scene.name: kind_of(evaluation.suite, scene) for scene in evaluation.suite.scenes}
    images = evaluation.images.assign(kind=[kinds[str(scene)] for scene in evaluation.images["scene"]])
    means: Any = images.astype({"success": float}).groupby(["arm", "kind"])["success"].mean()
    return {f"success, {kind}": [means.get((arm, kind)) for arm in arms] for kind in dict.fromkeys(kinds.values())}


def kind_of(suite: Suite, scene: SuiteScene) -> str:
    """The kind of a scene: by its number of subjects, whether they are of one class, or the first word of its name."""
    first = scene.name.split()[0]
    if first in ("small", "overlapping"):
        return first
    words = [suite.concept(name).class_word for name in scene.concepts if not suite.concept(name).is_style]
    return "one class" if len(words) > len(set(words)) else KINDS[len(words)]


def table(suite: str, columns: Sequence[str]) -> str:
    """The table of a suite, as Markdown."""
    found = pd.read_csv(RESULTS / f"{suite}.csv")
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for row in found.to_dict("records"):
        arm = f"*{row['arm']}*" if row["role"] == "sanity" else row["arm"]
        lines.append([arm, *(_cell(row, name) for name in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping[Any, Any], column: str) -> str:
    return COLUMNS[column](row) if column in COLUMNS else _number(row[column], 2)


def written(text: str) -> str:
    """A page with its tables anew."""

    def block(found: re.Match[str]) -> str:
        if not (RESULTS / f"{found[2]}.csv").is_file():
            return found[0]  # a table whose evaluation has not been run stays as it is
        columns = [column.strip() for column in found[3].split("|")]
        return f"{found[1]}{table(found[2], columns)}\n{found[4]}"

    return _BLOCK.sub(block, text)


def main(folders: Sequence[str]) -> None:
    """Keeps the results of finished evaluations, and writes the tables of all pages."""
    RESULTS.mkdir(exist_ok=True)
    for folder in folders:
        name, found = kept(Path(folder))
        found.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g", lineterminator="\n")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
