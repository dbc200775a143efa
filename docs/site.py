"""mkdocs: pages of the site that lie outside of `docs/`, and links that lead there."""

import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = {
    "README.md": "start.md",
    "CHANGELOG.md": "changelog.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "assets/playground/README.md": "playground.md",
}
"""Path in the repository, and page of the site."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE_BLOCK = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside."""
    for source, page in OUTSIDE.items():
        with open(posixpath.join(config.docs_dir, "..", source), encoding="utf-8") as file:  # noqa: PTH123
            files.append(File.generated(config, page, content=file.read()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns paths of the repository into pages of the site; what the site does not have stays as words."""
    here = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == here), f"docs/{here}")

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return text
        relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    return "".join(block if i % 2 else _LINK.sub(link, block) for i, block in enumerate(_CODE_BLOCK.split(markdown)))
