"""Options that several commands share: models, methods, concepts, settings, as the command line writes them."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_compose.compose.files.paths import check_lora, model_source
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.compose.support.names import check_merger, check_method, did_you_mean, file_near
from lora_compose.compose.support.savers import SAVERS, Saver
from lora_compose.pipelines.scene.scene import Concept, ControlFile, IPAdapterFile, Run, Scene
from lora_compose.pipelines.scene.sources import files_of, parse_lora
from lora_compose.pipelines.support.field_errors import FieldError

LAST_SEED = 2**63 - 1
_EDGE = r"\s*(\d{1,9}|\d?\.\d{1,9}|\d\.)\s*"
_BOX = re.compile(rf"\(?{_EDGE}([,:]){_EDGE}\2{_EDGE}\2{_EDGE}\)?")
_RAY = re.compile(r"local|auto|[^\s:/]+:\d{1,5}")
_CONCEPT_FIELDS = {
    "path": "lora", "name": "name", "trigger": "trigger", "class": "class_word", "weight": "weight", "region": "region",
    "role": "role", "alpha": "alpha", "blocks": "blocks", "prompt": "prompt", "negative": "negative_prompt",
    "merge": "merge", "any_weight": "any_weight",
}  # fmt: skip
LORA_HELP = (
    "A LoRA, repeatable, with its weight if that is not 1: cat.safetensors:0.8, playground:bear, user/my-cat. Trigger "
    "and class word come from the file's metadata; --concept gives them to files without."
)
BOX_HELP = (
    "The box of a LoRA, repeatable: the first for the first --lora, and so on; none for one without. left,top,right,"
    "bottom, in pixels (0,16,60,112) or as fractions of the image (0,0.1,0.5,0.9)."
)
LORAS_HELP = (
    "A folder of LoRAs. The prompt selects those that it names: by trigger, or by a class word that only one of them "
    "has."
)
CONCEPT_HELP = (
    "A concept in full, repeatable: path=cat.safetensors,trigger=sks,class=cat. Further fields: weight=0.8, name=cat, "
    "region=64,32,128,96. Only path is required; region is left,top,right,bottom in pixels or as fractions of the "
    "image (0,0.1,0.5,0.9), or a mask image (white = inside); role=style makes it act everywhere. Several files, "
    "path=cat.safetensors,path=style.safetensors:0.7, are merged; merge names the method. weight may change over "
    "the steps: 0:1,0.5:0 (off in the second half), 1..0.4 (linear ramp), 1,0.5,0 (equal parts); "
    "blocks=down:0.5,up.1:0 are factors by block; any_weight=true allows weights beyond 10; prompt and negative are "
    "its own; alpha is for files without one."
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
        help=f"Save memory; slower; repeatable. {'; '.join(f'{name}: {what}' for name, what in SAVERS.items())}.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        help="Work on a Ray cluster, whose machines need no shared folder; --processes is then its number of workers, "
        "by default one per GPU, or one per node without GPUs.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)]
GuidanceOption = Annotated[float, typer.Option("--guidance", help="Guidance scale of CFG; 1 or less turns it off.")]


ImageOption = Annotated[str | None, typer.Option("--image", help="Start from this image (image-to-image).")]
MaskImageOption = Annotated[
    str | None,
    typer.Option(
        "--mask-image",
        help="Inpaint only there: a mask image (white = painted), or left,top,right,bottom in pixels or "
        "as fractions of the image.",
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option("--strength", help="Fraction of the steps that are run, 0 to 1: higher changes more."),
]
PaddingOption = Annotated[
    int | None,
    typer.Option(
        "--padding-mask-crop", min=0, help="Pixels around the mask: only that part is painted, enlarged to the size."
    ),
]
PasteOption = Annotated[
    bool | None,
    typer.Option("--paste-original/--no-paste-original", help="Keep the image's own pixels outside of the mask."),
]


ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="A control image with its ControlNet or T2I-Adapter, repeatable: model=FOLDER,image=pose.png,scale=0.8. "
        "Further fields: start and end (parts of the steps), regions=cat:1,dog:0 (scales inside their regions).",
    ),
]
IPAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ip-adapter",
        help="An IP-Adapter with its image, repeatable: model=FOLDER,weight_name=FILE.safetensors,image=face.png. "
        "Further fields: subfolder, image_encoder, scale, region (a mask image, or left,top,right,bottom).",
    ),
]


def check_ray(address: str | None) -> None:
    """Raises ValueError if a Ray cluster is to be used and its address is none, or Ray is not installed."""
    if address is None:
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray {address}: Ray Client is not supported; start the command on a node of the cluster, with "
            "--ray HOST:PORT as `ray start` prints it, or --ray auto"
        )
    if not _RAY.fullmatch(address):
        raise ValueError(
            f"--ray {address}: expected local, auto (that of this machine) or HOST:PORT, e.g. 10.0.0.1:6379"
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs the package ray: pip install 'lora-compose[ray]'")


def parse_concept(text: str) -> Concept:
    """Reads a concept as it is written on the command line.

    Args:
        text: Such as "path=cat.safetensors,trigger=sks,class=cat,weight=0.8". Commas in values are kept.

    Raises:
        ValueError: For unknown and missing fields and unusable values.
    """
    fields = _fields("--concept", text, _CONCEPT_FIELDS, several="path")
    paths = fields.pop("lora", [])
    if not all(paths or [""]):
        raise ValueError(f"--concept {text}: path is missing: a safetensors file, a hub repository or playground:NAME")
    fields["lora"] = paths[0] if len(paths) == 1 else tuple(paths)
    if "region" in fields:
        fields["region"] = mask_or_box(fields["region"], f"--concept {text}: region")
    try:
        fields.setdefault("name", "+".join(map(_name_of, files_of(fields["lora"]))))
        return Concept(**fields)
    except FieldError as error:
        raise ValueError(f"--concept {text}: {'; '.join(error.messages)}") from error
    except ValueError as error:
        raise ValueError(f"--concept {text}: {error}") from error


def _fields(option: str, text: str, known: Mapping[str, str], several: str | None = None) -> dict[str, Any]:
    """Fields as an option writes them, "name=value,..."."""
    # A comma parts two fields only where a name and "=" follow.
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]
    fields: dict[str, Any] = {}
    for name, equals, value in ((name.strip(), equals, value.strip()) for name, equals, value in pairs):
        if not equals or name not in known:
            near = did_you_mean(name, known)
            raise ValueError(
                f"{option} {text}: unknown field {name!r}; fields are {', '.join(known)}, each with ={near}"
            )
        if name == several:
            fields.setdefault(known[name], []).append(value)
            continue
        if known[name] in fields:
            raise ValueError(f"{option} {text}: {name} is given twice")
        fields[known[name]] = value
    return fields


def guided_by(controls: Sequence[str] | None, ip_adapters: Sequence[str] | None) -> dict[str, Any]:
    """Control images and IP-Adapters of a scene, from options.

    Raises:
        ValueError: For unknown and missing fields and unusable values.
    """
    found: dict[str, Any] = {}
    for name, option, kind, texts in (
        ("controls", "--control", ControlFile, controls), ("ip_adapters", "--ip-adapter", IPAdapterFile, ip_adapters),
    ):  # fmt: skip
        if texts:
            found[name] = tuple(_guide(option, kind, text) for text in texts)
    return found


def _guide(option: str, kind: Any, text: str) -> Any:
    fields = _fields(option, text, {name: name for name in kind.model_fields})
    if "region" in fields:
        fields["region"] = mask_or_box(fields["region"], f"{option} {text}: region")
    try:
        return kind(**fields)
    except FieldError as error:
        raise ValueError(f"{option} {text}: {'; '.join(error.messages)}") from error


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


def concepts_of(concepts: Sequence[str], loras: Sequence[str], boxes: Sequence[str]) -> list[Concept]:
    """The concepts of --concept, --lora and --box.

    Raises:
        ValueError: For texts that cannot be read, and for another number of boxes than of LoRAs.
    """
    found = [parse_concept(text) for text in concepts]
    if boxes and len(boxes) != len(loras):
        raise ValueError(
            f"there are {len(boxes)} --box for {len(loras)} --lora; give one for each, in the same order, "
            "and --box none for a LoRA without a box"
        )
    for text, box in zip(loras, map(parse_box, boxes or ["none"] * len(loras)), strict=True):
        source, weight = parse_lora(text)
        try:
            found.append(Concept(name=_name_of(source), lora=source, weight=weight, region=box))
        except FieldError as error:
            raise ValueError(f"--lora {text}: {'; '.join(error.messages)}") from error
    return found


def parse_box(text: str, option: str = "--box", otherwise: str = "none") -> tuple[float, float, float, float] | None:
    """A box as written on the command line: whole numbers are pixels, and with a point they are fractions of the image.

    Args:
        text: Such as "0,16,60,112", "0,0.1,0.5,0.9", or "none". Colons may stand for the commas.
        otherwise: What may be written instead of a box.

    Raises:
        ValueError: For anything else, and for boxes without an area or outside the image.
    """
    if text.strip().lower() == "none":
        return None
    found = _BOX.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{option} {text}: expected left,top,right,bottom in pixels (0,16,60,112), as fractions of the image "
            f"(0,0.1,0.5,0.9), or {otherwise}"
        )
    edges = found.group(1, 3, 4, 5)
    in_parts = any("." in edge for edge in edges)
    left, top, right, bottom = map(float if in_parts else int, edges)
    if left >= right or top >= bottom:
        raise ValueError(f"{option} {text}: left has to be less than right, and top less than bottom")
    if in_parts and not (right <= 1 and bottom <= 1):
        raise ValueError(f"{option} {text}: with a point, a box is in fractions of the image, from 0 to 1")
    return left, top, right, bottom


def scene_of(path: Path | None, given: dict[str, Any], concepts: Sequence[Concept]) -> Scene:
    """A scene from a file, from options, or from a file overridden by options."""
    if path is None and "prompt" not in given:
        raise ValueError("there is no prompt: give --prompt TEXT or --scene FILE")
    if path is not None and concepts:
        raise ValueError("give the concepts in the scene file or with --lora and --concept, not both")
    fields: dict[str, Any] = {"concepts": tuple(concepts)}
    if path is not None:
        fields = dict(read_scene(path))
    try:
        return Scene(**{**fields, **given})
    except FieldError as error:
        raise ValueError("\n".join(error.messages)) from error


def run_of(**fields: Any) -> Run:
    """A run from the options.

    Raises:
        ValueError: For unusable values; a line for each.
    """
    try:
        return Run(**fields)
    except FieldError as error:
        raise ValueError("\n".join(error.messages)) from error


def check_names(asked: Run) -> None:
    """Checks the names of method, model and LoRAs of a run, without opening anything.

    Raises:
        ValueError: For an unknown name, with similar ones.
    """
    check_method(asked.method)
    model_source(asked.model)
    for concept in asked.scene.concepts:
        check_merger(concept.merge)
        for source in files_of(concept.lora):
            check_lora(source)


def mask_or_box(value: str, option: str) -> tuple[float, float, float, float] | str | None:
    """A mask image or a box, as written on the command line."""
    is_file = value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    return value if is_file else parse_box(value, option, "a mask image (.png, .jpg, .webp, .bmp)")


def check_folder(loras: Path, asked: Run) -> None:
    """Raises ValueError if there is no folder of LoRAs to choose from, or nothing to choose."""
    if not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}{file_near(loras)}; --loras names a folder of LoRAs")
    if asked.scene.concepts:
        raise ValueError(
            "with --loras the prompt chooses the concepts; leave out --lora, --concept and those of --scene"
        )


def _name_of(source: str) -> str:
    """The name of a concept by its file: "playground:cat" and "loras/cat.safetensors" are "cat"."""
    model, colon, name = source.partition(":")
    return Path(name if colon and model in PLAYGROUNDS else source).stem or source
