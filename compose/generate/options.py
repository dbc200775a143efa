"""Options that several commands share: models, methods, concepts, settings, as the command line writes them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.files.validation import complaints
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.savers import SAVERS, Saver
from lora_compose.pipelines.scene import Concept, Run, Scene

LAST_SEED = 2**63 - 1
_CONCEPT_FIELDS = {
    "path": "lora", "name": "name", "trigger": "trigger", "class": "class_word", "weight": "weight", "region": "region",
    "role": "role", "alpha": "alpha", "blocks": "blocks", "prompt": "prompt", "negative": "negative_prompt",
}  # fmt: skip
CONCEPT_HELP = (
    "A concept, repeatable: path=cat.safetensors,trigger=sks,class=cat,weight=0.8,name=cat,region=64:32:128:96. "
    "Only path is required; region is left:top:right:bottom in pixels or fractions, or a mask image (white = inside); "
    "role=style makes it act everywhere. weight may change over the steps: 0:1,0.5:0 (off in the second half), "
    "1..0.4 (linear ramp), 1,0.5,0 (equal parts); blocks=down:0.5,up.1:0 are factors by block; prompt and negative "
    "are its own; alpha is for files without one."
)


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="playground, a folder as diffusers saves it, a .safetensors file, or a hub repository."
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How concepts are fused; default: chosen from the concepts. clora:official: the authors' settings.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, repeatable, e.g. cfg_mask=broadcast")
]
SaversOption = Annotated[
    list[Saver] | None,
    typer.Option(
        "--save-memory",
        help=f"Less memory, but slower; repeatable. {'; '.join(f'{name}: {what}' for name, what in SAVERS.items())}.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)]
GuidanceOption = Annotated[float, typer.Option("--guidance", help="Guidance scale of CFG; 1 or less turns it off.")]

ImageOption = Annotated[str | None, typer.Option("--image", help="Start from this image (image-to-image).")]
MaskImageOption = Annotated[
    str | None,
    typer.Option(
        "--mask-image",
        help="Paint only there (inpainting): a mask image (white = painted), or left:top:right:bottom in pixels or "
        "fractions.",
    ),
]
StrengthOption = Annotated[
    float | None, typer.Option("--strength", help="Share of the steps that are run, above 0 to 1. More changes more.")
]
PaddingOption = Annotated[
    int | None,
    typer.Option(
        "--padding-mask-crop", min=0, help="Pixels around the mask: only that part is painted, enlarged to the size."
    ),
]
PasteOption = Annotated[
    bool | None,
    typer.Option("--paste-original/--no-paste-original", help="Outside of the mask, keep the pixels of the image."),
]


def starting_from(
    image: str | None,
    mask_image: str | None,
    strength: float | None,
    padding_mask_crop: int | None,
    paste_original: bool | None,
) -> dict[str, Any]:
    """The fields of a scene that say what it starts from, as options give them."""
    return {
        "image": image,
        "mask_image": None if mask_image is None else box_or_path("--mask-image", mask_image),
        "strength": strength,
        "padding_mask_crop": padding_mask_crop,
        "paste_original": paste_original,
    }


def parse_concept(text: str) -> Concept:
    """Reads a concept as it is written on the command line.

    Args:
        text: Such as "path=cat.safetensors,trigger=sks,class=cat,weight=0.8". Commas in values are kept.

    Raises:
        ValueError: For unknown and missing fields and unusable values.
    """
    known = ", ".join(_CONCEPT_FIELDS)
    # A comma parts two fields only where a name and "=" follow.
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]
    fields: dict[str, Any] = {}
    for name, equals, value in ((name.strip(), equals, value.strip()) for name, equals, value in pairs):
        if not equals or name not in _CONCEPT_FIELDS:
            raise ValueError(f"--concept {text}: unknown field {name!r}; fields are {known}, each with =")
        if _CONCEPT_FIELDS[name] in fields:
            raise ValueError(f"--concept {text}: {name} is given twice")
        fields[_CONCEPT_FIELDS[name]] = value
    if not fields.get("lora"):
        raise ValueError(f"--concept {text}: path is missing: a safetensors file, a hub repository or playground:NAME")
    fields.setdefault("name", Path(fields["lora"].removeprefix(f"{PLAYGROUND}:")).stem)
    if "region" in fields:
        fields["region"] = box_or_path(f"--concept {text}", fields["region"])
    try:
        return Concept(**fields)
    except ValidationError as error:
        raise ValueError(f"--concept {text}: {'; '.join(complaints(Concept, error))}") from error


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Reads settings as they are written on the command line, "cfg_mask=broadcast"; values are read as YAML.

    Raises:
        ValueError: For texts without "=" and settings given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: expected NAME=VALUE, such as cfg_mask=broadcast")
        if name.strip() in settings:
            raise ValueError(f"--set {text}: {name.strip()} is given twice")
        settings[name.strip()] = parse_value(value)
    return settings


def scene_of(path: Path | None, given: dict[str, Any], concepts: Sequence[str]) -> Scene:
    """A scene from a file, from options, or from a file with options that win."""
    if path is None and "prompt" not in given:
        raise ValueError("there is no prompt: give --prompt TEXT or --scene FILE")
    if path is not None and concepts:
        raise ValueError("give the concepts in the scene file or with --concept, not both")
    fields: dict[str, Any] = {"concepts": tuple(map(parse_concept, concepts))}
    if path is not None:
        fields = dict(read_scene(path))
    try:
        return Scene(**{**fields, **given})
    except ValidationError as error:
        raise ValueError("\n".join(complaints(Scene, error))) from error


def run_of(**fields: Any) -> Run:
    """A run from the options.

    Raises:
        ValueError: For unusable values; a line for each.
    """
    try:
        return Run(**fields)
    except ValidationError as error:
        raise ValueError("\n".join(complaints(Run, error))) from error


def box_or_path(where: str, value: str) -> tuple[float, ...] | str:
    """A box, left:top:right:bottom in whole pixels or fractions, or the path of a mask image.

    Args:
        where: What complaints name.
        value: As it is written on the command line.

    Raises:
        ValueError: For anything else.
    """
    if value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")):
        return value
    if re.fullmatch(r"\d+:\d+:\d+:\d+", value):
        return tuple(int(number) for number in value.split(":"))
    if re.fullmatch(r"([01]|[01]?\.\d+)(:([01]|[01]?\.\d+)){3}", value):
        return tuple(float(number) for number in value.split(":"))
    raise ValueError(
        f"{where}: region must be left:top:right:bottom in whole pixels or fractions of 0 to 1, or a mask image, not "
        f"{value!r}"
    )
