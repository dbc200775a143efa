"""The docs are true: links lead somewhere, public names are in the reference, and commands can be typed.

What commands do is in `test_commands_of_the_docs.py`, and Python in `test_snippets.py`.
"""

import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import lora_compose
from doc_tables import program
from lora_compose.compose.cli import app
from snippets import CODE_BLOCK, PAGES, ROOT, blocks, name_of, named, typed


def words(page: Path) -> str:
    """A page without its code."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda found: found[0].replace("[", "(").replace("]", ")"), text)


def anchors(page: Path) -> set[str]:
    """Where links into a page can lead: its headings, as GitHub names them."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def links(page: Path) -> Iterator[str]:
    text = words(page)
    yield from re.findall(r"\]\(([^()\s]+)\)", text)
    yield from re.findall(r'<(?:img|source)\b[^>]*? src(?:set)?="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_other_tools_are_named_with_the_version_that_was_read() -> None:
    start, *sections = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8").split("\n## ")
    tools = {re.match(r"[\w-]+", section)[0]: section for section in sections}  # pyright: ignore[reportOptionalSubscript]
    assert {"tool", *tools} == set(re.findall(r"^\| ([\w-]+)", start, re.MULTILINE))
    for tool, section in tools.items():
        there = section.partition("\nThere (")[2].partition("):")[0]
        assert re.search(r"commit `[0-9a-f]{7}`|(version|diffusers) \d", there), tool


def test_every_figure_is_shown_on_some_page() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert set((ROOT / "docs/images").iterdir()) <= shown


def test_every_public_name_is_in_the_reference_and_nothing_else() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    table = text.partition("\n## ")[0]
    described = set(re.findall(r"^<!-- (?!end)(\w+) -->$", text, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert named == set(lora_compose.__all__)
    constants = {name for name in named if not callable(getattr(lora_compose, name))}
    assert described == named - constants


def test_the_reference_is_that_of_the_source() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert text == program("reference_page").written(text), "python docs/reference_page.py"


def test_every_public_argument_of_a_call_is_in_the_reference() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    call = text.partition("#### `ComposePipeline.__call__`")[2].partition("\n#### ")[0]
    assert set(inspect.signature(lora_compose.ComposePipeline.__call__).parameters) - {"self"} <= set(
        re.findall(r"\w+", call)
    )


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    docs = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert docs <= listed
    hook = (ROOT / "docs/site.py").read_text()
    outside = dict(re.findall(r'^    "([^"]+)": "([^"]+)",$', hook, re.MULTILINE))
    assert listed - docs == set(outside.values())
    assert all((ROOT / path).is_file() for path in outside)


@cache
def program_command() -> Any:
    """The program with all its commands."""
    return typer.main.get_command(app)


def parse(arguments: list[str], *, whole: bool) -> None:
    """Parses a command as the program does, without running it.

    Raises:
        ClickException: For unknown options, values of the wrong kind and, if it is `whole`, missing arguments.
    """
    command = program_command()
    rest = [word for word in arguments if word != "..."]
    while hasattr(command, "commands"):
        known = bool(rest) and rest[0] in command.commands
        assert known or command.name == "evaluate", arguments  # which runs a suite if no command is named
        command = command.commands[rest.pop(0) if known else "run"]
    if "--help" in rest:
        return
    try:
        command.make_context(command.name, rest)
    except Exception as error:  # typer has click as its own or beside it
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_can_be_parsed(page: Path) -> None:
    for arguments in typed(page):
        parse(arguments, whole=True)
    for arguments in named(page):
        if arguments not in (["blind"], ["comfyui"]):
            parse(arguments, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_other_lines_of_a_page_name_what_is_there(page: Path) -> None:
    """Targets of make, modules of ours, and extras. `git clone`, `curl` and `openssl` are not checked."""
    whole, text = page.read_text(encoding="utf-8"), "\n".join(blocks(page, "bash", "powershell"))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", whole, re.MULTILINE)) <= targets
    for module in re.findall(r"-m ((?:lora_compose|recipe)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for found in re.findall(
        r"(?:lora-compose|LORA-COMPOSE|--editable '\.)\[([\w,]+)\]", page.read_text(encoding="utf-8")
    ):
        assert set(found.split(",")) <= extras


def test_no_page_leaves_the_address_of_the_repository_open() -> None:
    assert [name_of(page) for page in PAGES if "REPOSITORY" in page.read_text(encoding="utf-8")] == []
