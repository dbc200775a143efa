"""The docs are true: links lead somewhere, public names are in the reference, and commands can be typed."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import save_file

import lora_compose
from commands import call
from components import lora_tensors, random_lora, tiny_xl_pipeline
from lora_compose.compose.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "assets").rglob("*.md")],
    key=lambda path: path.as_posix(),
)
CODE_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def words(page: Path) -> str:
    """A page without its code."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda found: found[0].replace("[", "(").replace("]", ")"), text)


def anchors(page: Path) -> set[str]:
    """Where links into a page can lead: its headings, as GitHub names them, and the names of the reference."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    slugs = {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def links(page: Path) -> Iterator[str]:
    text = words(page)
    yield from re.findall(r"\]\(([^()\s]+)\)", text)
    yield from re.findall(r'<img src="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_figure_is_shown_on_some_page() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert set((ROOT / "docs/images").iterdir()) <= shown


def test_every_public_name_is_in_the_reference_and_nothing_else() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    table = text.partition("\n## ")[0]
    described = set(re.findall(r"^::: lora_compose\.(\w+)$", text, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert named == set(lora_compose.__all__)
    constants = {name for name in named if not callable(getattr(lora_compose, name))}
    assert described == named - constants


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    docs = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert docs <= listed
    hook = (ROOT / "docs/site.py").read_text()
    outside = dict(re.findall(r'^    "([^"]+)": "([^"]+)",$', hook, re.MULTILINE))
    assert listed - docs == set(outside.values())
    assert all((ROOT / path).is_file() for path in outside)


def typed(page: Path) -> list[list[str]]:
    """The commands of ours on a page, as lists of words, also those in tables."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(code for kind, code in CODE_BLOCK.findall(text) if kind == "bash").replace("\\\n", " ")
    inline = re.findall(r"`(lora-compose [^`]+)`", CODE_BLOCK.sub("", text).replace("\n", " "))
    found = [line for line in blocks.splitlines() if re.match(r"\s*(\.venv/bin/)?lora-compose ", line)] + inline
    return [shlex.split(line, comments=True)[1:] for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_have_these_options(page: Path) -> None:
    for arguments in typed(page):
        command: Any = typer.main.get_command(app)
        rest = list(arguments)
        while hasattr(command, "commands") and rest:
            named = rest[0] in command.commands
            assert named or command.name == "evaluate", arguments  # which runs a suite if no command is named
            command = command.commands[rest.pop(0) if named else "run"]
        known = {name for it in command.params for name in (*it.opts, *it.secondary_opts)} | {"--help"}
        assert {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)} <= known, arguments


@pytest.mark.slow
def test_the_tutorial_runs_from_the_first_to_the_last_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model of SDXL's structure: boxes and canvas are an eighth, two steps, on the CPU."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_xl_pipeline()
    pipe.save_pretrained("model")
    for seed, name in enumerate(("cat", "dog")):
        save_file(lora_tensors(unet=random_lora(pipe.unet, seed, size=0.05)), f"{name}.safetensors")
    tutorial = ROOT / "docs/tutorial.md"
    (scene,) = (code for kind, code in CODE_BLOCK.findall(tutorial.read_text(encoding="utf-8")) if kind == "yaml")
    Path("scene.yaml").write_text(re.sub(r"\b\d{2,4}\b", lambda found: str(int(found[0]) // 8), scene))
    commands = [line for line in typed(tutorial) if line[0] != "replay" or len(line) == 2]
    assert {command for command, *_ in commands} == {"inspect", "run", "check", "replay"}
    for command, *rest in commands:
        line = " ".join(map(shlex.quote, rest)).replace(SDXL, "model").replace("float16", "float32")
        line = line.replace("--save-memory model-offload", "--steps 2 --device cpu")  # a CPU has nowhere to offload to
        call(command, *shlex.split(line))
    assert Path("outputs/composer/3.png").is_file()
    assert Path("outputs/composer-stronger/3.png").is_file()
    shutil.rmtree("outputs")
