"""What can be judged of a run before its model is opened, which takes minutes for a large one."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

import torch

from lora_compose.attention import backbone_of
from lora_compose.attention.backbones.joint import PATCH
from lora_compose.compose.generate.guides import check_references, guide_source
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.generate.making import method_of
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.calls.memory import check_size
from lora_compose.pipelines.calls.resolved_call import check_model_for, check_start_for
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.lru import file_key
from lora_compose.pipelines.formats.files import read_words, refuse_format, trained_with
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.mask_images import open_image
from lora_compose.pipelines.scene.regions import check_region
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.tokens import check_all_named

_T = TypeVar("_T")

_IMAGES = {
    "mask_image": "mask", "references": "reference image", "controls": "control image",
    "ip_adapters": "IP-Adapter image",
}  # fmt: skip
"""What images are called, by the field of a scene."""


@dataclass(frozen=True)
class Header:
    """A concept with what the headers of its files say; their weights have not been read."""

    concept: Concept
    trained_with: str | None
    words: Words


def check_early(run: Run, facts: ModelFacts | None = None, *, here: bool = True) -> None:
    """Checks method, settings, images, LoRA files, triggers, boxes and size: by headers and the model's configuration.

    LoRAs on the model hub are downloaded for it, which a run does anyway.

    Args:
        run: With the precision in which it is made (`defaults.complete`).
        facts: Of the run's model, if they are known.
        here: Whether it is made on this machine, whose memory is judged.

    Raises:
        ValueError: For the first problem, as a call would raise it after the model was opened.
        OSError: If the model hub does not give a LoRA.
    """
    _judge(run, facts_of(run.model) if facts is None else facts, lambda check, *given: check(*given), here=here)


def early_problems(run: Run, facts: ModelFacts, *, here: bool = True) -> list[str]:
    """All that `check_early` would raise, one after the other."""
    problems: list[str] = []
    _judge(run, facts, partial(attempt, problems), here=here)
    return list(dict.fromkeys(problems))


def attempt(problems: list[str], function: Callable[..., _T], *given: Any) -> _T | None:
    """What a function gives; if it refuses, its message becomes one of the problems, and the answer is None."""
    try:
        return function(*given)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None


def _judge(run: Run, facts: ModelFacts, tried: Callable[..., Any], *, here: bool) -> None:
    """Runs each check by `tried`, which raises what is wrong or keeps it; then the checks after it are run as well."""
    scene = run.scene
    method = tried(method_of, run)
    tried(_check_images, scene, facts)
    size = _size(scene, facts)
    tried(_check_size, run, facts, size, here)
    prompt = normalize("NFC", tried(plain_text, scene.prompt) or scene.prompt)
    headers = [tried(_header, concept) for concept in scene.concepts]
    for concept, header in zip(scene.concepts, headers, strict=True):
        tried(check_all_named, [header.concept if header else concept], prompt)
    if method is not None:
        tried(_check_method, method, facts, scene)
        if all(headers):
            tried(method.check_concepts, headers, [prompt])
    if scene.image is None:  # otherwise regions are in its coordinates
        for concept in scene.concepts:
            tried(check_region, concept, *size)


def _check_method(method: Settings, facts: ModelFacts, scene: Scene) -> None:
    """Raises ValueError for a method that the model, or a call from the scene's image, cannot run."""
    check_model_for(method, reads_regions=facts.reads_regions)
    if scene.image is not None:
        check_start_for(method, facts.family.strength_for(scene.strength, scene.mask_image is not None))


def _size(scene: Scene, facts: ModelFacts) -> tuple[int | None, int | None]:
    """Width and height of a scene's images; None where the model or the images that it reads decide it."""
    from_images = scene.references or (scene.image is not None and scene.padding_mask_crop is None)
    own = (None, None) if from_images else facts.own_size or (None, None)
    return scene.width or own[0], scene.height or own[1]


def _check_size(run: Run, facts: ModelFacts, size: tuple[int | None, int | None], here: bool) -> None:
    """Raises ValueError for sides that the model does not make, and sizes that need more memory than there is."""
    (width, height), cell = size, facts.latent_cell
    if width is None or height is None or cell is None:
        return
    facts.family.check_multiples(cell if facts.has_unet else cell * PATCH, width, height)
    own_width, own_height = facts.own_size or (0, 0)
    if not here or width * height <= own_width * own_height:  # a model that is opened can make its own size
        return
    if (denoiser := facts.denoiser(run.dtype)) is not None:
        check_size(backbone_of(denoiser), cell, torch.device(choose_device(run.device)), width, height)


def _check_images(scene: Scene, facts: ModelFacts) -> None:
    """Raises ValueError for images that are missing or damaged, and those that the model does not read, or lacks."""
    check_references(facts.family, scene)
    advice = ": give one (references, --reference); for text alone take Qwen-Image"
    facts.family.check_has_references(bool(scene.references), advice)
    if scene.image is not None:
        facts.family.task_for(scene.mask_image is not None)
    for name, path in scene.image_files.items():
        field, _, part = name.rpartition(".")
        open_image(path, "mask" if part == "region" else _IMAGES.get(field.partition(".")[0] or part, "image"))
    for control in scene.controls:
        guide_source(control.model, "control model")
    for adapter in scene.ip_adapters:
        guide_source(adapter.model, "IP-Adapter")


def _header(concept: Concept) -> Header:
    """A concept with the words in the header of its first file; raises ValueError if it lacks one."""
    if concept.lora is None and not concept.is_bystander:
        raise ValueError(f"concept {concept.name!r} has no LoRA; give `lora`, a file or a hub repository")
    trained, words = set(), []
    for source in files_of(concept.lora):
        path = find_file(lora_source(source))
        refuse_format(path)
        of_training, of_file = told_by(path)
        trained.add(of_training)
        words.append(of_file)
    if not words:
        return Header(concept, None, Words())
    known = Concept(name=concept.name, trigger=words[0].trigger, class_word=words[0].class_word)
    return Header(_composed(concept.completed(known)), trained.pop() if len(trained) == 1 else None, words[0])


def _composed(concept: Concept) -> Concept:
    """A concept whose words are in NFC, as prompts are."""
    words = {name: text for name in ("trigger", "class_word") if (text := getattr(concept, name))}
    return concept.model_copy(update={name: normalize("NFC", text) for name, text in words.items()})


def told_by(path: Path) -> tuple[str | None, Words]:
    """How a file was trained, and its words, by its header, which is read again when the file has changed.

    Raises LoraError if it has no readable header, and OSError if there is no such file.
    """
    return _told_by(path, file_key([path], None))


@lru_cache(maxsize=4096)  # thousands of rows of a table name the same few, and requests to a server
def _told_by(path: Path, state: Hashable) -> tuple[str | None, Words]:
    return trained_with(path), read_words(path)
