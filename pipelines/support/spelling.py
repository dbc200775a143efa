"""Parts of error messages: suggestions for mistyped names, and shortened texts."""

from collections.abc import Collection
from difflib import get_close_matches

_MOST_NAMES = 10_000  # that are compared
_MOST_LETTERS = 80
_LEAST_LETTERS = 4  # of the beginning of a name
_MEANT = {
    "steps": ("num_inference_steps",), "seed": ("generator",), "guidance": ("guidance_scale",),
    "cfg": ("guidance_scale", "guidance"), "negative": ("negative_prompt",), "size": ("width", "height"),
    "resolution": ("width", "height"), "loras": ("concepts",), "lora": ("concepts",),
    "box": ("region",), "mask": ("region", "mask_image"), "bbox": ("region",), "path": ("lora",), "file": ("lora",),
    "class": ("class_word",), "cls": ("class_word",), "noun": ("class_word",), "word": ("trigger",),
    "scale": ("weight",), "strength": ("weight",), "class_word": ("class",), "num_inference_steps": ("steps",),
}  # fmt: skip
"""Other programs' names for what is asked for here, whose letters differ too much to be alike."""


def meant_by(name: str, known: Collection[str]) -> list[str]:
    """What another program's name is called here, as far as it is known."""
    return [candidate for candidate in _MEANT.get(name.lower(), ()) if candidate in known]


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'clora'?", or nothing if none is similar."""
    if meant := meant_by(name, known):
        return f"; did you mean {(' and ' if 'width' in meant else ' or ').join(map(repr, meant))}?"
    # Letters of either case, since get_close_matches takes "CLoRA" and "clora" for different words.
    by_lower = {candidate.lower(): candidate for candidate in list(known)[:_MOST_NAMES]}
    begun = [candidate for candidate in by_lower if len(name) >= _LEAST_LETTERS and candidate.startswith(name.lower())]
    near = [by_lower[alike] for alike in get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6) or begun[:2]]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def shortened(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text) if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]!r}..."
