"""Text of users on a page: names and prompts are shown as they are, whatever markup is in them."""

import html
import re

from lora_compose.compose.support.terminal import plain

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~:$&@=^/])")


def markdown(text: str) -> str:
    """Text for places that read Markdown: labels, captions, messages."""
    return _MARKUP.sub(r"\\\1", " ".join(plain(text).split()))


def markup(text: str) -> str:
    """Text for HTML, attributes included."""
    return html.escape(plain(text), quote=True)
