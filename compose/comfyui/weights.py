"""Weights in brackets, as ComfyUI's tokenizers read them: everything else works with the plain text."""

import re

from lora_compose.pipelines.text.emphasis import Weighted, weights_of

BARE = 1.1
"""The factor of brackets without a number."""
_SIGN = re.compile(r"\\[()]|.", re.DOTALL)


def read_weights(text: str) -> Weighted:
    r"""Reads weights: "(words:1.3)", or "(words)" for 1.1. Of nested ones, the innermost number counts.

    Brackets that are part of the text, "\(" and "\)", stay as they are written.
    """
    read: list[tuple[str, float, bool]] = []  # signs, their weights, and whether a number has said these
    opened: list[int] = []
    for sign in _SIGN.findall(text):
        read.append((sign, 1.0, False))
        if sign == "(":
            opened.append(len(read) - 1)
        elif sign == ")" and opened:
            start = opened.pop()
            inside, weight = _number_of(read[start + 1 : -1])
            factor = BARE if weight is None else weight
            read[start:] = [(s, w if said else w * factor, said or weight is not None) for s, w, said in inside]
    weights = tuple(weight for sign, weight, _ in read for _ in sign)
    return Weighted("".join(sign for sign, *_ in read), weights)


def _number_of(inside: list[tuple[str, float, bool]]) -> tuple[list[tuple[str, float, bool]], float | None]:
    """What is in brackets without its number, and the number behind the last colon; None if there is none."""
    colon = max((i for i, (sign, *_) in enumerate(inside) if sign == ":"), default=0)
    try:
        return (inside[:colon], float("".join(sign for sign, *_ in inside[colon + 1 :]))) if colon else (inside, None)
    except ValueError:
        return inside, None


def written(text: str) -> str:
    """A plain text with its weights as it is written for ComfyUI."""
    weights = list(weights_of(text))
    for i, sign in enumerate(text):
        if i and sign.isspace():  # words of one weight stay together
            weights[i] = weights[i - 1]
    parts, start = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or weights[i] != weights[start]:
            parts.append(_written(text[start:i], weights[start]))
            start = i
    return "".join(parts)


def _written(part: str, weight: float) -> str:
    words = part.rstrip()
    if weight == 1 or not words:
        return part
    number = "" if weight == BARE and ":" not in words else f":{weight:g}"
    return f"({words}{number}){part[len(words) :]}"
