"""Text on the page: that of users as it is, whatever markup is in it; messages in the page's words, without Python."""

import html
import re
from collections.abc import Mapping

from lora_compose.compose.page.labels import METHOD_LABELS, SETTING_LABELS, label_of
from lora_compose.compose.support.terminal import plain

_CODE = re.compile(r"\w=|[\[{]|\w\(|\w_(?!block)\w")  # the names of blocks are those that one writes for their weights
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~:$&@=^/])")


def markdown(text: str) -> str:
    """Text for places that read Markdown: labels, captions, messages."""
    return _MARKUP.sub(r"\\\1", " ".join(plain(text).split()))


def markup(text: str) -> str:
    """Text for HTML, attributes included."""
    return html.escape(plain(text), quote=True)


def page_message(message: str, method: str | None = None, files: Mapping[str, str] | None = None) -> str:
    """A message as the page shows it; `files` are names to show, by names on the disk."""
    for stored, shown in (files or {}).items():
        message = message.replace(stored, shown)
    message = message.replace("any_weight=True", "“Any weight” under “More”")
    message = re.sub(r"method='([\w-]+)'", lambda match: f"“{label_of(match[1]).name}”", message)
    for name, label in (SETTING_LABELS.get(method or "", {})).items():
        message = re.sub(rf"^{name}\b", f"“{label}”", message)
    names = "|".join(METHOD_LABELS)
    message = re.sub(rf"^({names})\b(?!\.)", lambda match: f"“{label_of(match[1]).name}”", message)
    message = re.sub(r" \([^()]*\w_\w[^()]*\)", "", message)
    message = re.sub(r"(?<!\w)'([^']*)'(?!\w)", r"“\1”", _without_code(message))
    is_name = "." in message.partition(" ")[0].rstrip(".:;,")  # as a file's, which keeps its first letter
    return message if is_name else message[:1].upper() + message[1:]


def _without_code(message: str) -> str:
    """The message without clauses that contain Python; the first clause is kept in any case."""
    clauses: list[str] = []
    for piece in re.split(r"(?<=[,;:]) ", message):
        if clauses and _is_open(clauses[-1]):
            clauses[-1] += f" {piece}"
        else:
            clauses.append(piece)
    return " ".join([*clauses[:1], *(clause for clause in clauses[1:] if not _CODE.search(clause))]).rstrip(",;: ")


def _is_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in ("()", "[]", "{}"))
