"""Weights in prompts, as people write them: in "a (striped:1.3) cat" one word counts more.

Everything else works with the plain text. What a method derives from a prompt keeps the weights of its words: the parts
of a plain text have them (`Weighted`).
"""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from lora_compose.pipelines.support.spelling import shortened

MOST = 10.0
"""The largest weight."""

_TAIL = re.compile(r"(?<!\d)\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")  # "(16:9)" is no weight


class Weighted(str):
    """A plain text with a weight for each character; its slices, and sums that begin or end with it, keep them."""

    weights: tuple[float, ...]

    def __new__(cls, text: str, weights: Iterable[float]) -> "Weighted":
        """A text with a weight for each of its characters."""
        made = super().__new__(cls, text)
        made.weights = tuple(weights)
        return made

    def __getnewargs__(self) -> tuple[str, tuple[float, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return str(self), self.weights

    def __getitem__(self, key: Any) -> str:
        part = super().__getitem__(key)
        return Weighted(part, self.weights[key]) if isinstance(key, slice) else part

    def __add__(self, other: str) -> "Weighted":
        return Weighted(super().__add__(other), self.weights + weights_of(other))

    def __radd__(self, other: str) -> "Weighted":
        return Weighted(str(other) + str(self), weights_of(other) + self.weights)

    @property
    def text(self) -> str:
        """The text without weights."""
        return str(self)

    @property
    def is_even(self) -> bool:
        """Whether nothing has a weight."""
        return all(weight == 1 for weight in self.weights)

    def fragments(self) -> tuple[list[str], list[float]]:
        """Texts in their order, each with one weight; blanks between two go with neither."""
        pieces = []
        for weight, group in groupby(range(len(self)), key=self._weight_at):
            indices = list(group)
            pieces.append((self.text[indices[0] : indices[-1] + 1].strip(), weight))
        kept = [(text, weight) for text, weight in pieces if text]
        return [text for text, _ in kept], [weight for _, weight in kept]

    def written(self) -> str:
        """The text as it is written, with the signs of the weights."""
        if self.is_even and not has_weights(self.text):
            return self.text
        escaped = [(re.sub(r"([()])", r"\\\1", text), weight) for text, weight in zip(*self.fragments(), strict=True)]
        return " ".join(text if weight == 1 else f"({text}:{weight:g})" for text, weight in escaped)

    def _weight_at(self, i: int) -> float:
        """The weight of a character; a blank has that of the word before it."""
        while i > 0 and super().__getitem__(i).isspace():
            i -= 1
        return self.weights[i]


def weights_of(text: str) -> tuple[float, ...]:
    """The weight of each character of a plain text."""
    return text.weights if isinstance(text, Weighted) else (1.0,) * len(text)


def substituted(pattern: re.Pattern[str], words: str, text: str) -> str:
    """A plain text with other words in place of each match, which have the weight of its first character."""
    if not isinstance(text, Weighted):
        return pattern.sub(words, text)
    weights: list[float] = []
    end = 0
    for match in pattern.finditer(text):
        start = match.start()
        weights += text.weights[end:start] + text.weights[start : start + 1] * len(words)
        end = match.end()
    return Weighted(pattern.sub(words, text), (*weights, *text.weights[end:]))


def replaced(text: str, start: int, end: int, words: str) -> str:
    """A plain text with other words in place of a span, which have the weight of its first character."""
    if isinstance(text, Weighted):
        words = Weighted(words, text.weights[start : start + 1] * len(words))
    return text[:start] + words + text[end:]


def read_emphasis(text: str) -> Weighted:
    r"""Reads weights: "(words:1.3)". They may be nested, and then multiply; "\(" is a parenthesis and no weight.

    A plain text that has weights (`Weighted`) has been read already. Raises ValueError for weights outside of 0 to
    `MOST`.
    """
    if isinstance(text, Weighted):
        return text
    written: list[tuple[str, float]] = []
    opened: list[int] = []
    weighted = False
    characters = iter(text)
    for character in characters:
        if character == "\\":
            written.append((character + next(characters, ""), 1.0))
            continue
        if character == "(":
            opened.append(len(written))
        elif character == ")" and opened:
            start = opened.pop()
            inside = "".join(part for part, _ in written[start + 1 :])
            tail = _TAIL.search(inside)
            if tail is not None:
                weight, weighted = float(tail[1]), True
                if not 0 <= weight <= MOST:
                    raise ValueError(
                        f"the weight in {('(' + inside + ')')[-60:]!r} is {tail[1]}; expected 0 to {MOST:g}, "
                        "such as (word:1.3)"
                    )
                length, end = 0, start + 1
                while length < tail.start():  # an escaped character has two letters
                    length += len(written[end][0])
                    end += 1
                written[start:] = [(part, before * weight) for part, before in written[start + 1 : end]]
                continue
        written.append((character, 1.0))
    if not weighted:
        return Weighted(text, (1.0,) * len(text))
    plain = [(part[1:] if part[:2] in ("\\(", "\\)") else part, weight) for part, weight in written]
    weights = tuple(weight for part, weight in plain for _ in part)
    return Weighted("".join(part for part, _ in plain), weights)


def has_weights(text: str) -> bool:
    """Whether a prompt has signs of weights, also of weight 1."""
    return read_emphasis(text) != text


def plain_text(text: str) -> str:
    """A prompt without the signs of its weights, which its parts keep (`Weighted`)."""
    read = read_emphasis(text)
    return text if read == text else read


def written(text: str) -> str:
    """A text as it is written: one that has weights (`Weighted`) gets their signs."""
    return text.written() if isinstance(text, Weighted) else text


def refuse_weights(texts: Iterable[str], why: str | None = None) -> None:
    """Raises ValueError if a text has weights; without a reason (`why`), since the model reads plain texts only."""
    wrong = next(filter(has_weights, texts), None)
    if wrong is not None:
        why = why or "work with SD 1.x, 2.x, XL and FLUX.1"
        raise ValueError(f"weights as in {shortened(wrong)} {why}; leave out the parentheses with a number")
