"""Writes what came of diffusers' own tests into `docs/models.md`: `python docs/diffusers_table.py FOLDER`.

FOLDER has the reports of `tests/diffusers_own.py`, named `SUITE.control.json` and `SUITE.concepts.json`, where SUITE is
one of its `FILES`. Counts are kept in `diffusers_run.json`, and stay for suites of which there is no report.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_diffusers_own import BETTER, REFUSED  # noqa: E402

PAGE, RAN = ROOT / "docs" / "models.md", ROOT / "docs" / "diffusers_run.json"
KINDS = ("passed", "refused", "failed", "fails in diffusers too", "not run here")
_BLOCK = re.compile(r"(<!-- diffusers -->\n).*?(<!-- end -->)", re.DOTALL)


def counts(folder: Path) -> dict[str, dict[str, int]]:
    """How many tests of each suite passed with concepts, or what else came of them."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.concepts.json")):
        suite = path.name.removesuffix(".concepts.json")
        outcomes, control = (
            json.loads((folder / f"{suite}.{mode}.json").read_text()) for mode in ("concepts", "control")
        )
        kinds = Counter(_kind(outcome, text, control[test][0]) for test, (outcome, text) in outcomes.items())
        found[suite] = {kind: kinds[kind] for kind in KINDS}
    return found


def _kind(outcome: str, text: str, control: str) -> str:
    if outcome == "passed" or text.startswith(BETTER):
        return "passed"
    if outcome == "skipped" and text.startswith("("):  # otherwise diffusers expects it to fail
        return "not run here"
    if any(it in text for it in REFUSED):
        return "refused"
    return "failed" if control == "passed" else "fails in diffusers too"


def written(text: str) -> str:
    """The page with the table anew."""
    ran = json.loads(RAN.read_text(encoding="utf-8"))
    lines = [("suite", *KINDS), ("---",) * (len(KINDS) + 1)]
    lines += [(suite, *(str(ran[suite][kind]) for kind in KINDS)) for suite in sorted(ran)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _BLOCK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


if __name__ == "__main__":
    if sys.argv[1:]:
        known = json.loads(RAN.read_text(encoding="utf-8")) if RAN.exists() else {}
        kept = dict(sorted({**known, **counts(Path(sys.argv[1]))}.items()))
        RAN.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
