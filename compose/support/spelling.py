"""Advice of the library in the words of the command line: options instead of Python."""

import re
from collections.abc import Callable, Sequence


def _box(match: re.Match[str]) -> str:
    return f"--box {match[1].replace(' ', '')}"


def _field(match: re.Match[str]) -> str:
    return f"{match[1].partition('_')[0]}={match[2]} in --concept"


_RULES: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = (
    (r"Concept\(name='[^']*', region=\(([^()]+)\)\)", _box),
    (r"(?:Concept|load_concept)\(.*?, (trigger|class_word|prompt)='?([^']+?)'?\)", _field),
    (r"\bwords=\{'([^']*)': \[\.\.\.\]\}", r"--set words='{\1: [...]}'"),
    (r"\bany_weight=True\b", "any_weight=true in --concept"),
    (r"\bmethod='([\w:-]+)'", r"--method \1"),
    (r"\b([A-Z][a-z]+)\((\w+)=([\w.]+)\)", lambda match: f"--method {match[1].lower()} --set {match[2]}={match[3]}"),
    (r"\b(quantize|strength)='?([\w.]+)'?", r"--\1 \2"),
    (r"\b([a-z_]+)=(?:'(\w+)'|(True|False)\b)", lambda match: f"--set {match[1]}={match[2] or match[3].lower()}"),
)
"""Patterns of Python, and the options that mean the same, in the order in which they are replaced."""


def as_options(message: str) -> str:
    """A message of the library as the command line shows it."""
    for pattern, replacement in _RULES:
        message = re.sub(pattern, replacement, message)
    return message
