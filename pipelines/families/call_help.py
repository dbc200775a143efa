"""The help of a family's `__call__`: what all families share, put before what the family says of its own."""

import re
from collections.abc import Collection, Mapping
from inspect import cleandoc, signature
from textwrap import indent

from lora_compose.pipelines.calls.front import OF_OURS
from lora_compose.pipelines.families.base import ComposePipeline

_START_IMAGE = """
image: What image-to-image and inpainting start from: a PIL image, a path, an array, a tensor, or one for each
    prompt. Regions are in its coordinates.
strength: The share of the steps that are run; None is diffusers' default for the task.
"""
"""Arguments of families that can start from an image, as in the section "Args" of a docstring."""

_INPAINTING = """
mask_image: White where the image is painted: as `image`, or a box in pixels or fractions.
padding_mask_crop: Pixels around the mask; only that part is painted, enlarged to width and height.
paste_original: Whether pixels outside of the mask are the image's own; greys of the mask blend.
"""
"""Arguments of families that can paint a part of an image."""

_ARGUMENTS = re.compile(r"^Args:\n((?:    .*\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+): (.*(?:\n    .*)*)", re.MULTILINE)


def describe_call(family: type[ComposePipeline]) -> None:
    """Adds the arguments that all families share to the docstring of a family's own `__call__`."""
    tasks: list[object] = [getattr(family, name, None) for name in ("image_to_image", "inpainting")]
    further = (_START_IMAGE if any(tasks) else "", _INPAINTING if tasks[1] else "")
    call = vars(family)["__call__"]
    own, shared = (it.__doc__ or "" for it in (call, ComposePipeline.__call__))  # python -OO leaves out docstrings
    call.__doc__ = _with_shared(own, shared, signature(call).parameters, *further)


def _with_shared(own: str, shared: str, takes: Collection[str], *further: str) -> str:
    """The docstring of a family's `__call__`, with the arguments that it does not describe itself.

    What a family says of one of our arguments is put after what all families say of it; of any other argument, it is
    put in its place.

    Args:
        shared: The docstring of the base class.
        takes: Names of the arguments of the call; others are left out.
        further: Entries of arguments, beside those of the base class.
    """
    own = cleandoc(own)
    mine = _entries(_section(own))
    ours = {name: text for part in (_section(cleandoc(shared)), *further) for name, text in _entries(part).items()}
    entries = {name: text for name, text in ours.items() if name in takes}
    for name, text in mine.items():
        entries[name] = f"{entries[name]}\n    {text}" if name in entries and name in OF_OURS else text
    lines = "\n".join(f"{name}: {text}" for name, text in entries.items())
    section = f"Args:\n{indent(lines, '    ')}\n    Further arguments are those of diffusers' pipeline.\n"
    if _ARGUMENTS.search(own):
        return _ARGUMENTS.sub(lambda _: section, own, count=1)
    text, returns, rest = own.partition("\nReturns:")
    return f"{text.rstrip()}\n\n{section}{returns}{rest}"


def _section(docstring: str) -> str:
    """The entries of a docstring's arguments, without their indentation."""
    match = _ARGUMENTS.search(docstring)
    return cleandoc("\n" + match[1]) if match else ""


def _entries(section: str) -> Mapping[str, str]:
    return dict(_ENTRY.findall(section))
