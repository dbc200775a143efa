"""Text of users on a page: names and prompts are shown as they are, whatever markup is in them."""

import html
import re

from compose.terminal import plain

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~:$&@=^/])")

PALETTE = ("#1f9e89", "#e07a1f", "#7a5cd6", "#c9427d", "#3b82c4", "#8a9a1b", "#b5553c", "#5c6b8a")
"""Colours of concepts, in their order; seen well on light and on dark ground."""


def markdown(text: str) -> str:
    """Text for places that read Markdown: labels, captions, messages."""
    return _MARKUP.sub(r"\\\1", " ".join(plain(text).split()))


def markup(text: str) -> str:
    """Text for HTML, attributes included."""
    return html.escape(plain(text), quote=True)


def colour(index: int) -> str:
    """The colour of a concept."""
    return PALETTE[index % len(PALETTE)]
