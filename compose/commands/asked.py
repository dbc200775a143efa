"""Reads what the options of commands say: concepts, boxes, settings, seeds, and the run that is made of them."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_compose.compose.batch.settings import LAST_SEED, parse_seeds
from lora_compose.compose.files.paths import check_lora, model_source
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.compose.support.names import METHODS, check_merger, check_method, did_you_mean, file_near
from lora_compose.pipelines.scene.mask_images import IMAGE_SUFFIXES
from lora_compose.pipelines.scene.scene import Concept, ControlFile, IPAdapterFile, Run, Scene
from lora_compose.pipelines.scene.sources import files_of, parse_lora
from lora_compose.pipelines.support.field_errors import FieldError
from lora_compose.pipelines.support.quantising import check_quantize

_EDGE = r"\s*(\d{1,9}|\d?\.\d{1,9}|\d\.)\s*"
_BOX = re.compile(rf"\(?{_EDGE}([,:]){_EDGE}\2{_EDGE}\2{_EDGE}\)?")
_RAY = re.compile(r"local|auto|(ray://)?[^\s:/]+:\d{1,5}")
_CONCEPT_FIELDS = {
    "path": "lora", "name": "name", "trigger": "trigger", "class": "class_word", "weight": "weight", "region": "region",
    "role": "role", "alpha": "alpha", "blocks": "blocks", "prompt": "prompt", "negative": "negative_prompt",
    "merge": "merge", "any_weight": "any_weight", "references": "references",
}  # fmt: skip
_OF_SCENE = (
    "prompt", "negative_prompt", "width", "height", "image", "strength", "padding_mask_crop", "paste_original",
)  # fmt: skip
_OF_RUN = ("model", "method", "scheduler", "steps", "dtype", "quantize", "device")
"""Options of `run` and `check` that are fields of a scene and of a run, as they are."""


def check_ray(address: str | None) -> None:
    """Raises ValueError if a Ray cluster is to be used and its address is none, or Ray is not installed."""
    if address is None:
        return
    if not _RAY.fullmatch(address):
        raise ValueError(
            f"--ray {address}: expected local, auto (that of this machine), HOST:PORT, e.g. 10.0.0.1:6379, or "
            "ray://HOST:PORT, e.g. ray://10.0.0.1:10001"
        )
    packages = ("ray", "grpc") if address.startswith("ray://") else ("ray",)
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--ray {address} needs the package {missing[0]}: pip install 'lora-compose[ray]'")


def parse_concept(text: str) -> Concept:
    """Reads a concept as it is written on the command line.

    Args:
        text: Such as "path=cat.safetensors,trigger=sks,class=cat,weight=0.8", or "role=bystander,class=man". Commas in
            values are kept.

    Raises:
        ValueError: For unknown and missing fields and unusable values.
    """
    fields = _fields("--concept", text, _CONCEPT_FIELDS, several="path")
    paths = fields.pop("lora", [])
    bystander = not paths and fields.get("role") == "bystander"
    if not bystander and not all(paths or [""]):
        raise ValueError(f"--concept {text}: path is missing: a safetensors file, a hub repository or playground:NAME")
    if bystander and not fields.keys() & {"class_word", "name"}:
        raise ValueError(f"--concept {text}: class is missing: the word that names it in the prompt, such as class=man")
    if not bystander:
        fields["lora"] = paths[0] if len(paths) == 1 else tuple(paths)
    if "region" in fields:
        fields["region"] = mask_or_box(fields["region"], f"--concept {text}: region")
    try:
        if bystander and "class_word" in fields:  # a LoRA of this class may have its name
            fields.setdefault("name", f"other {fields['class_word']}")
        fields.setdefault("name", "+".join(map(_name_of, files_of(fields.get("lora")))))
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
    """Control images and IP-Adapters of a scene, from options. Raises ValueError for fields that cannot be used."""
    guides: dict[str, Any] = {}
    for name, option, kind, texts in (
        ("controls", "--control", ControlFile, controls), ("ip_adapters", "--ip-adapter", IPAdapterFile, ip_adapters),
    ):  # fmt: skip
        if texts:
            guides[name] = tuple(_guide(option, kind, text) for text in texts)
    return guides


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
    named = [parse_concept(text) for text in concepts]
    if boxes and len(boxes) != len(loras):
        raise ValueError(
            f"there are {len(boxes)} --box for {len(loras)} --lora; give one for each, in the same order, "
            "and --box none for a LoRA without a box"
        )
    for text, box in zip(loras, map(parse_box, boxes or ["none"] * len(loras)), strict=True):
        source, weight = parse_lora(text)
        try:
            named.append(Concept(name=_name_of(source), lora=source, weight=weight, region=box))
        except FieldError as error:
            raise ValueError(f"--lora {text}: {'; '.join(error.messages)}") from error
    return named


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
    match = _BOX.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{option} {text}: expected left,top,right,bottom in pixels (0,16,60,112), as fractions of the image "
            f"(0,0.1,0.5,0.9), or {otherwise}"
        )
    edges = match.group(1, 3, 4, 5)
    in_parts = any("." in edge for edge in edges)
    left, top, right, bottom = map(float if in_parts else int, edges)
    if left >= right or top >= bottom:
        raise ValueError(f"{option} {text}: left has to be less than right, and top less than bottom")
    if in_parts and not (right <= 1 and bottom <= 1):
        raise ValueError(f"{option} {text}: with a point, a box is in fractions of the image, from 0 to 1")
    return left, top, right, bottom


def seeds_of(texts: Sequence[str] | None) -> tuple[int, ...]:
    """Seeds as written, each once: numbers and spans, such as 3 or 0-7; 0 if there are none."""
    seeds = tuple(dict.fromkeys(parse_seeds(list(texts or ["0"]))))
    if max(seeds) > LAST_SEED:
        raise ValueError(f"the seed {max(seeds)} is too large; the last one is {LAST_SEED}")
    return seeds


def asked_run(given: Mapping[str, Any], *, looked_up: bool = True) -> Run:
    """The run that the options of `run` and `check` describe, by their names; None was not given.

    With `looked_up`, method, model and LoRAs have to exist. Raises ValueError for all that can be seen unopened.
    """
    mask, settings, loras = given["mask_image"], given["settings"], given["loras"]
    fields = {
        **{name: given[name] for name in _OF_SCENE}, "references": given["reference"] or None,
        "mask_image": None if mask is None else mask_or_box(mask, "--mask-image"),
        **guided_by(given["control"], given["ip_adapter"]),
    }  # fmt: skip
    concepts = concepts_of(given["concept"] or [], given["lora"] or [], given["box"] or [])
    asked = run_of(
        scene=scene_of(given["scene"], {name: value for name, value in fields.items() if value is not None}, concepts),
        settings=parse_settings(settings) if settings else None, guidance_scale=given["guidance"],
        **{name: given[name] for name in _OF_RUN},
    )  # fmt: skip
    if looked_up:
        check_lookups(asked)
    if loras is not None:
        check_folder(loras, asked)
    return asked


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
    """A run from the options; None was not given (`defaults.complete`). Raises ValueError, a line for each fault."""
    try:
        return Run(**{name: value for name, value in fields.items() if value is not None})
    except FieldError as error:
        raise ValueError("\n".join(error.messages)) from error


def check_lookups(asked: Run) -> None:
    """Raises ValueError for unknown names of method, model or LoRAs, with similar ones; nothing is opened."""
    check_method(asked.method)
    if asked.settings and asked.method is None:
        raise ValueError(f"--set {', '.join(asked.settings)}: a setting needs --method; there are {', '.join(METHODS)}")
    model_source(asked.model)
    check_quantize(asked.quantize)
    for concept in asked.scene.concepts:
        check_merger(concept.merge)
        for source in files_of(concept.lora):
            check_lora(source)


def mask_or_box(value: str, option: str) -> tuple[float, float, float, float] | str | None:
    """A mask image or a box, as written on the command line."""
    is_file = value.lower().endswith(IMAGE_SUFFIXES)
    return value if is_file else parse_box(value, option, "a mask image (.png, .jpg, .webp, .bmp)")


def check_folder(loras: Path, asked: Run | None = None) -> None:
    """Raises ValueError if there is no folder of LoRAs to choose from, or none in it, or a run names others."""
    if not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}{file_near(loras)}; --loras names a folder of LoRAs")
    if not any(loras.glob("*.safetensors")):
        raise ValueError(f"{str(loras)!r} has no safetensors files; --loras names a folder of LoRAs")
    if asked is not None and asked.scene.concepts:
        raise ValueError(
            "with --loras the prompt chooses the concepts; leave out --lora, --concept and those of --scene"
        )


def _name_of(source: str) -> str:
    """The name of a concept by its file: "playground:cat" and "loras/cat.safetensors" are "cat"."""
    model, colon, name = source.partition(":")
    return Path(name if colon and model in PLAYGROUNDS else source).stem or source


def check_loras(folder: Path | None) -> None:
    """Raises ValueError if the folder of --loras does not exist."""
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"there is no folder {str(folder)!r}{file_near(folder)}; --loras names a folder with safetensors files"
        )
