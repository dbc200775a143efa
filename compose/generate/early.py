"""What can be judged of a run before its model is opened, which takes minutes for a large one."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unicodedata import normalize

from lora_compose.compose.generate.guides import check_references
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.calls.resolved_call import check_model_for, check_start_for
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.lru import file_key
from lora_compose.pipelines.formats.files import read_words, refuse_format, trained_with
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.methods import METHODS, make_method
from lora_compose.pipelines.scene.scene import Concept, Run, Scene, check_box
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.tokens import check_all_named


@dataclass(frozen=True)
class Header:
    """A concept with what the headers of its files say; their weights have not been read."""

    concept: Concept
    trained_with: str | None
    words: Words


def check_early(run: Run, facts: ModelFacts | None = None) -> None:
    """Checks method, settings, images, LoRA files, triggers and boxes: by headers, and by the model's configuration.

    LoRAs on the model hub are downloaded for it, which a run does anyway.

    Args:
        facts: Of the run's model, if they are known.

    Raises:
        ValueError: For the first problem, as a call would raise it after the model was opened.
    """
    scene = run.scene
    method = None if run.method is None else make_method(run.method, run.settings)
    if method is None and run.settings:
        raise ValueError(f"the settings {', '.join(run.settings)} need a method; there are {', '.join(METHODS)}")
    facts = facts_of(run.model) if facts is None else facts
    _check_images(scene, facts)
    prompt = normalize("NFC", plain_text(scene.prompt))
    headers = [_header(concept) for concept in scene.concepts]
    check_all_named((header.concept for header in headers), prompt)
    if method is not None:
        if not headers:
            raise ValueError(f"the method {run.method} needs concepts, and the scene has none")
        check_model_for(method, reads_regions=facts.reads_regions)
        if scene.image is not None:
            check_start_for(method, facts.family.strength_for(scene.strength, scene.mask_image is not None))
        method.check_concepts(headers, [prompt])
    if scene.image is None and not scene.references:  # otherwise the size may be theirs
        own = facts.own_size or (None, None)
        for concept in scene.concepts:
            check_box(concept, scene.width or own[0], scene.height or own[1])


def _check_images(scene: Scene, facts: ModelFacts) -> None:
    """Raises ValueError for images that the model does not read, or lacks."""
    check_references(facts.family, scene)
    advice = ": give one (references, --reference); for text alone take Qwen-Image"
    facts.family.check_has_references(bool(scene.references), advice)
    if scene.image is not None:
        facts.family.task_for(scene.mask_image is not None)


def _header(concept: Concept) -> Header:
    """A concept with the words in the header of its first file."""
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
