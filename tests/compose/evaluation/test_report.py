"""The report of an evaluation: its content, in one file."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from evaluations import TRUTH, Seen, known, sanity, store, suite
from lora_compose.compose.evaluation.batches import Batch
from lora_compose.compose.evaluation.gallery import MANY, SIDE, SMALL_SIDE
from lora_compose.compose.evaluation.report import Report, facts, marked, number, warnings, write_report
from lora_compose.compose.evaluation.results import PLAN, BatchPlan
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.evaluation.summary import METRICS, OUTCOME_METRICS, summary
from lora_compose.compose.evaluation.table import load
from lora_compose.compose.files.images import Machine

FILES = ["report.html", "report.md", "images.csv", "concepts.csv", "confusion.csv", "summary.json"]
ABSENT = (
    "style",
    "bystanders",
    "inside",
    "dino",
    "dino_found",
    "scr",
    "scr_whole",
    "arcface",
)  # nothing measured, no column
EVIL = (
    'a <script>alert("x")</script> sks cat & a zwx dog | *bold* \x1b[31m\u202e " onmouseover="alert(1)" '
    "' onload='alert(1)' </script></style></title><svg/onload=alert(1)> {{ 7 * 7 }} ]]> -->"
)


class _Page(HTMLParser):
    """Everything of a page that could load something, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.alts: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        found = {name: value or "" for name, value in attrs}
        self.sources += [
            value for name, value in found.items() if name in ("src", "srcset", "poster", "data", "background")
        ]
        self.links += [value for name, value in found.items() if name.endswith("href")]
        self.alts += [found.get("alt", "")] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def evil() -> Suite:
    return suite(model="<b>model</b>", scenes=[{"name": "both", "prompt": EVIL, "concepts": ["cat", "dog"]}])


def partly(batch: Batch, seed: int) -> Seen | str | None:
    gaps = {("tara", 1): "RuntimeError: <img src=x onerror=alert(1)> in `step`", ("tara", 2): None}
    return gaps.get((batch.arm.name, seed), known(batch, seed))


@pytest.fixture(autouse=True)
def _plots_are_drawn_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing plots takes as long as the rest of a small report."""
    if "written" not in request.fixturenames:
        monkeypatch.setattr("lora_compose.compose.evaluation.report.against_cost", lambda *_: "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(store(tmp_path_factory.mktemp("report"), evil(), partly, draw=True, truth=TRUTH))


@pytest.fixture(scope="module")
def written(report: Report) -> Path:
    return report.html.parent


def report_of(tmp_path: Path, of: Suite, measured: Any, **changes: Any) -> str:
    write_report(store(tmp_path, of, measured, **changes))
    return _Page(tmp_path / "report.html").words


# --- the files ---


def test_the_files(report: Report, written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted([*FILES, PLAN, "batches"])
    assert list(report) == [written / name for name in FILES]


def test_the_same_results_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_report(store(tmp_path, evil(), partly, draw=True, truth=TRUTH))
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = _Page(written / "report.html")
    text = (written / "report.html").read_text(encoding="utf-8")
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith("#") or (written / link).is_file() for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\((?!#)", re.sub(r"data:image/\w+;base64,[\w+/=]+|&lt;.*?&gt;", "", text))
    assert all(page.alts)


def test_identifiers_of_the_page_are_distinct(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'\sid="([^"]+)"', text)
    assert len(set(found)) == len(found)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(found)


# --- what a stranger wrote ---


def test_names_and_prompts_are_not_markup(written: Path) -> None:
    page = _Page(written / "report.html")
    assert "<script>alert(" in page.words  # as text
    assert "<b>model</b>" in page.words
    assert "<img src=x onerror=alert(1)>" in page.words
    assert "{{ 7 * 7 }}" in page.words
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.tags.count("svg") == 2  # the plots
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown + "".join(page.tags)
    assert "<img" not in markdown
    assert r"\`step\`" in markdown


def test_characters_that_steer_are_spelled_out(written: Path) -> None:
    for name in FILES[:2]:
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", (written / name).read_text(encoding="utf-8"))
    assert r"\x1b[31m\u202e" in _Page(written / "report.html").words


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "'", '"', "<"])
def test_no_name_is_a_formula_where_tables_are_opened(start: str) -> None:
    """Spreadsheets compute what begins so. Names go into the CSV files as they are, so that no name may."""
    name = f"{start}cmd()"
    for changes in (
        {"name": name},
        {"scenes": [{"name": name, "prompt": "a sks cat", "concepts": ["cat"]}]},
        {"methods": [{"name": name, "method": "merge"}]},
        {"concepts": [{**suite().concepts[0].model_dump(), "name": name}]},
        {"concepts": [{**suite().concepts[0].model_dump(), "lora": {name: "cat.safetensors"}}]},
    ):
        with pytest.raises(ValidationError, match="should match pattern"):
            suite(**changes)


def test_text_in_tables_is_names_and_paths(written: Path) -> None:
    for name in ("images.csv", "concepts.csv"):
        table = pd.read_csv(written / name, keep_default_na=False).select_dtypes(["object", "string"])
        assert {"scene", "arm", "alone"} < set(table)
        assert all(re.fullmatch(r"|\w.*", cell) for cell in table.to_numpy(dtype=str).flat)


def test_marked_text_is_one_line_without_markup() -> None:
    assert marked("a|b\n*c* <i>_d_ [e](f) `g`") == r"a\|b \*c\* &lt;i&gt;\_d\_ \[e\](f) \`g\`"


# --- numbers ---


def test_numbers_agree_everywhere(written: Path) -> None:
    table = summary(load(written)).to_dict("records")
    stored = json.loads((written / "summary.json").read_text())
    images = pd.read_csv(written / "images.csv")
    page = _Page(written / "report.html").words
    lines = (written / "report.md").read_text(encoding="utf-8").split("| Kept", 1)[0].splitlines()
    for row, kept in zip(table, stored, strict=True):
        (line,) = (line for line in lines if re.match(rf"\| \*?{row['arm']}[* ]", line))
        of_arm = images[images["arm"] == row["arm"]]
        for metric in (metric for metric in METRICS if metric.key not in ABSENT):
            shown = number(row[metric.key], metric)
            assert f" {shown}" in line
            assert shown in page
            assert kept[metric.key] == pytest.approx(row[metric.key]) or pd.isna(row[metric.key])
            if len(of_arm):  # one scene, so that the mean over scenes is that over images
                assert number(of_arm[metric.key].astype(float).mean(), metric) == shown


def test_tables_for_pandas(written: Path) -> None:
    images, concepts = pd.read_csv(written / "images.csv"), pd.read_csv(written / "concepts.csv")
    assert len(images) == 14
    assert all((written / file).is_file() for file in images["file"])
    merge = concepts[(concepts["arm"] == "merge") & (concepts["concept"] == "cat")]
    assert merge["own"].tolist() == [0.6, 0.0]
    assert merge["present"].tolist() == [True, False]
    assert [row["arm"] for row in json.loads((written / "summary.json").read_text())][-1] == "tara"


def test_outcomes_are_the_same_everywhere(written: Path) -> None:
    stored = {row["arm"]: row for row in json.loads((written / "summary.json").read_text())}
    lines = (written / "report.md").read_text(encoding="utf-8").split("| Kept", 1)[1].splitlines()
    page = (written / "report.html").read_text(encoding="utf-8")
    for arm in ("no LoRA", "alone", "merge", "regional"):
        (line,) = (line for line in lines if line.startswith(f"| {arm} |"))
        assert line.split(" | ")[1:] == [
            f"{shown} |" if last else shown
            for last, shown in (
                (metric is OUTCOME_METRICS[-1], number(stored[arm][metric.key], metric)) for metric in OUTCOME_METRICS
            )
        ]
        assert sum(stored[arm][metric.key] for metric in OUTCOME_METRICS[:6]) == pytest.approx(1)
    assert re.findall(r'<i class="(\w+)" style="width:([\d.]+)%" title="\w+: ([\d.]+)"', page)[-5:] == [
        ("kept", "50.0", "0.50"), ("dominance", "25.0", "0.25"), ("missing", "25.0", "0.25"),  # merge
        ("kept", "75.0", "0.75"), ("drift", "25.0", "0.25"),  # regional
    ]  # fmt: skip


def test_cells_are_means_of_the_table_for_pandas(written: Path) -> None:
    cells = pd.read_csv(written / "confusion.csv")
    taken = cells[(cells["arm"] == "merge") & (cells["concept"] == "dog") & (cells["reference"] == "cat")]
    assert taken["difference"].tolist() == pytest.approx([0.5 - 0.1, 0.2 - 0.1])
    page = (written / "report.html").read_text(encoding="utf-8")
    merge = page.split("<caption>merge</caption>", 1)[1]
    found = re.findall(r'<td class="(\w+)" style="--strength:([\d.]+)%" title="(.*?)">(.*?)</td>', merge)[:4]
    # cat: 0.6 in the only image that has it; dog: 0.3 and 0.5. The page's largest difference is that of "no LoRA": 0.6
    assert [(kind, number) for kind, _, _, number in found] == [
        ("own", "\u22120.30"), ("other", "+0.20"), ("other", "+0.25"), ("own", "\u22120.40")
    ]  # fmt: skip
    assert [float(strength) for _, strength, _, _ in found] == pytest.approx([30, 20, 25, 40])
    assert found[2][2] == (
        "in the place of dog, references of cat: 0.35; the references among themselves 0.10; limit 0.40"
    )


def test_scores_of_older_versions_have_a_report(tmp_path: Path) -> None:
    words = report_of(tmp_path, suite(seeds=[1]), known)
    assert "an older version scored them" in words
    assert "images are kept, and only scored" in words


def test_bystanders_are_not_named_where_there_are_none(written: Path) -> None:
    assert "ystander" not in (written / "report.md").read_text(encoding="utf-8")
    assert "a bystander is missing" not in (written / "report.html").read_text(encoding="utf-8")


def test_numbers_are_short_and_signed() -> None:
    assert number(0.12345) == "0.12"
    assert number(-0.5, digits=1) == "\u22120.5"
    assert number(0.5, METRICS[0], sign=True) == "+0.50"
    assert number(float("nan")) == number(None) == "\u2013"


def test_the_page_begins_with_how_many_images_of_each_row_succeed(written: Path) -> None:
    words = _Page(written / "report.html").words
    first = words[words.index("Images Seed 1 of the first scenes") : words.index("Outcomes Every subject")]
    shares = re.findall(r"(\d+) of (\d+) images? succeeds?", first)
    rows = json.loads((written / "summary.json").read_text())
    shown = [row for row in rows if row["images"] and not row["arm"].startswith("alone")]
    assert shares == [(str(round(row["success"] * row["images"])), str(row["images"])) for row in shown]
    assert ("1", "2") in shares
    assert "its similarity to its own references, 1 at most" in first


def test_facts_about_images(written: Path) -> None:
    words = _Page(written / "report.html").words
    assert "dog 0.300 dominance: cat" in words
    assert "cat 0.490 too low" in words
    assert "cat not found" in words
    assert "both, merge, seed 2: cat not found, dog found" in _Page(written / "report.html").alts
    assert words.count("not there yet") == 1
    assert "both , tara, seeds 1" in words


def test_verdicts_in_words(tmp_path: Path) -> None:
    scenes = {f"scene {i}": ("cat", "dog") for i in range(10)}
    methods: dict[str, Seen] = {
        "merge": {"cat": (0.5, 0.2), "dog": (0.5, 0.2)},
        "regional": {"cat": (0.7, 0.1), "dog": (0.6, 0.1)},
        "tara": {"cat": (0.2, 0.3), "dog": (0.1, 0.3)},
    }
    words = report_of(tmp_path, suite(scenes, seeds=[1]), lambda batch, seed: sanity(batch) or methods[batch.arm.name])
    assert "better than merge" in words
    assert "worse than merge" in words
    assert "no verdict" not in words
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "better than merge" in next(line for line in markdown.splitlines() if line.startswith("| regional"))
    assert "worse than merge" in next(line for line in markdown.splitlines() if line.startswith("| tara"))


# --- warnings ---


def test_few_scenes_and_gaps_are_reported(written: Path) -> None:
    for text in (_Page(written / "report.html").words, (written / "report.md").read_text(encoding="utf-8")):
        assert "1 scene: intervals of so few say little" in text
        assert "2 batches of 16 failed or are not made yet" in text


def test_a_concept_that_the_encoder_does_not_recognise_is_reported(tmp_path: Path) -> None:
    out = store(tmp_path, suite(), lambda batch, seed: {"cat": (0.5, 0.2), "dog": known(batch, seed)["dog"]})
    told = " ".join(warnings(load(out)))
    assert "The encoder cannot recognise cat" in told
    assert "cannot recognise dog" not in told


def test_mixed_versions_and_machines_are_reported(tmp_path: Path) -> None:
    store(tmp_path, suite(seeds=[1]), known)
    plan = BatchPlan.model_validate_json((tmp_path / PLAN).read_text())
    path = tmp_path / "batches" / plan.batches[0].key / "made.json"
    made = json.loads(path.read_text())
    other = Machine(device="cuda:0", name="a GPU", threads=1)
    path.write_text(json.dumps(made | {"versions": {"torch": "3"}, "machine": other.model_dump()}))
    evaluation = load(tmp_path)
    told = " ".join(warnings(evaluation))
    assert "different versions" in told
    assert "different machines" in told
    assert "torch 3; or torch 2" in " ".join(facts(evaluation).values())


def test_an_evaluation_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    words = report_of(tmp_path, suite(), lambda batch, seed: None)
    assert "16 batches of 16 failed or are not made yet" in words
    assert "No images with scores yet." in words


# --- images ---


def embedded(page: Path) -> list[tuple[str, Image.Image]]:
    parts = [source.removeprefix("data:image/").split(";base64,") for source in _Page(page).sources]
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in parts]


def test_small_images_are_embedded_as_they_are(written: Path) -> None:
    sources = _Page(written / "report.html").sources
    for file in pd.read_csv(written / "images.csv")["file"]:
        assert f"data:image/png;base64,{base64.b64encode((written / file).read_bytes()).decode()}" in sources


def test_large_images_are_embedded_smaller(tmp_path: Path) -> None:
    store(tmp_path, suite(seeds=[1], methods=["merge"]), known, draw=True)
    for path in tmp_path.glob("batches/*/*.png"):
        Image.new("RGB", (1024, 512)).save(path)
    write_report(tmp_path)
    sizes = {image.size for kind, image in embedded(tmp_path / "report.html") if max(image.size) > SMALL_SIDE}
    assert sizes == {(SIDE, SIDE // 2)}
    style = re.search(r'title="cat" style="([^"]*)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert style is not None
    assert style[1] == "left:0.2%;top:1.56%;width:5.86%;height:21.88%"  # of 1024 x 512


def test_many_images_are_embedded_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MANY > 5
    monkeypatch.setattr("lora_compose.compose.evaluation.gallery.MANY", 5)
    store(tmp_path, suite(methods=["merge"]), known, draw=True)
    Image.new("RGB", (512, 512)).save(next(tmp_path.glob("batches/*/1.png")))
    write_report(tmp_path)
    assert {kind for kind, _ in embedded(tmp_path / "report.html")} == {"webp"}
    assert max(max(image.size) for _, image in embedded(tmp_path / "report.html")) == SMALL_SIDE
    assert f"at no more than {SMALL_SIDE} pixels" in _Page(tmp_path / "report.html").words


def test_an_image_that_is_gone_or_damaged_leaves_a_gap(tmp_path: Path) -> None:
    store(tmp_path, suite(seeds=[1], methods=["merge", "regional"]), known, draw=True)
    next(tmp_path.glob("batches/both-merge*/1.png")).unlink()
    next(tmp_path.glob("batches/both-regional*/1.png")).write_bytes(b"no image")
    write_report(tmp_path)
    assert _Page(tmp_path / "report.html").words.count("image missing") == 2 * 2  # at the top and among all
