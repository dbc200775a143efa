r"""Words of triggers, class words and tags: underscores are spaces, and `\(` is a bracket that is no weight."""

import re

_BETWEEN = re.compile(r"(?<=[^\s_])[\s_]+(?=[^\s_])")
_ESCAPED = re.compile(r"\\([()\[\]])")


def unescaped(text: str) -> str:
    r"""A text without the signs that tell brackets from weights: "saber \(fate\)" is "saber (fate)"."""
    return _ESCAPED.sub(r"\1", text)


def parts_of(words: str) -> list[str]:
    """The words of a tag: of "hatsune_miku" and of "hatsune miku" they are "hatsune" and "miku"."""
    return _BETWEEN.split(words)


def spaced(words: str) -> str:
    """Words in small letters, with single spaces and no signs of weights: the same for all spellings of a booru tag."""
    if words.isalnum():  # thousands of stored concepts have one word
        return words.lower()
    return " ".join(parts_of(unescaped(words).strip().lower()))


def ending(words: str, end: str) -> tuple[int, int] | None:
    """Where words end before others at their end, and where these begin: (4, 5) for "ohwx_man" and "man".

    None if they do not end so, or are nothing else.
    """
    gaps = [gap.span() for gap in _BETWEEN.finditer(words)]
    many = len(parts_of(end.strip())) if end.strip() else len(gaps) + 1
    if many > len(gaps) or spaced(words[gaps[-many][1] :]) != spaced(end):
        return None
    return gaps[-many]


def without_ending(words: str, end: str) -> str:
    """Words without others at their end: "ohwx" of "ohwx_man" and "man"; the same words if they do not end so."""
    cut = ending(words, end)
    return words[: cut[0]].strip(" ,") if cut else words
