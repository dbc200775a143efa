"""Data and adapter of a training, before its first step; words and images are checked before any work is done."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from peft import LoraConfig

from lora_compose.compose.training.alignment import Alignment
from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.data import TrainingImage, digest, read_images, warn_of_small, with_references
from lora_compose.compose.training.examples import Examples, encode_images, of_class, of_one_length
from lora_compose.compose.training.focus import Focus, focus_on_triggers
from lora_compose.compose.training.model import ADAPTER, add_lora, on_device
from lora_compose.compose.training.sampling import generate_class_images
from lora_compose.compose.training.settings import Training
from lora_compose.compose.training.words import (
    CaptionWords,
    WordFeatures,
    check_class_caption,
    class_caption,
    find_concept,
    rows_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """The concept's images, its words by caption, the samples' prompts with trigger tokens, and the side."""

    images: tuple[TrainingImage, ...]
    words: dict[str, CaptionWords]
    samples: tuple[tuple[str, Sequence[int]], ...]
    side: int


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The encoded images of concept and class, rows to align (None without TARA), and the SHA-256 of it all."""

    concept: Examples
    prior: Examples | None
    rows: WordFeatures | None
    data: str


@dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRA in the network, where its token mask is set (with TARA), and its alignment loss; None without these."""

    config: LoraConfig
    focus: Focus | None = None
    alignment: Alignment | None = None


def read_captioned(base: Base, settings: Training) -> CaptionedImages:
    """Reads images and captions and finds the concept's words. Raises DataError if anything cannot be used."""
    images = read_images(settings.images, [settings.filled(settings.prompt)])
    images = with_references(images, settings.references)
    if len(images) == 1:
        logger.warning("there is one image: its background and pose will be learnt with the concept; five are better")
    side = settings.resolution or base.side
    warn_of_small(images, side)
    noun = settings.tara is not None and settings.tara.needs_class_word
    clean = settings.tara is not None and settings.tara.class_target == "clean"

    def find(caption: str, noun: bool) -> CaptionWords:
        return find_concept(base.tokenizers, caption, settings.concept, noun=noun, clean=clean)

    words = {caption: find(caption, noun) for caption in dict.fromkeys(image.caption for image in images)}
    prompts = settings.sample_prompts or (next(iter(words)),)
    samples = tuple((prompt, find(prompt, noun=False).trigger) for prompt in prompts)
    return CaptionedImages(images, words, samples, side)


def encode(base: Base, captioned: CaptionedImages, settings: Training, accelerator: Accelerator) -> TrainingData:
    """Encodes all images and captions; generates missing class images first. The network is not on the device."""
    class_images = _class_images(base, settings, accelerator, captioned.side)
    others = [part for part in base.pipe.components.values() if part is not base.network]
    with on_device(others, accelerator.device):
        return _encoded(base, captioned, class_images, settings)


def _encoded(
    base: Base, captioned: CaptionedImages, class_images: Sequence[TrainingImage], settings: Training
) -> TrainingData:
    tara = settings.tara is not None  # otherwise nothing asks where triggers are
    triggers = {caption: words.trigger for caption, words in captioned.words.items()} if tara else {}
    concept = encode_images(base, captioned.images, triggers, captioned.side)
    prior = encode_images(base, class_images, {}, captioned.side) if class_images else None
    if settings.preserves:
        images, preserved = captioned.images, []
        if settings.preserve_class:
            preserved += [replace(it, caption=class_caption(it.caption, settings.concept)) for it in images]
        if base.unconditional is not None:  # guidance takes the unconditional prediction off, LoRA included
            preserved += [replace(it, caption=base.unconditional) for it in images]
        prior = of_class(base, concept, preserved, captioned.side)
    if prior is not None:
        concept, prior = of_one_length(concept, prior)
    rows = None
    if settings.tara is not None and settings.tara.needs_class_word:
        class_text, _ = base.texts([words.class_caption for words in captioned.words.values()])
        rows = rows_of(list(captioned.words.values()), concept.text, class_text)
    logger.info("%d images of the concept, %d of its class", len(captioned.images), len(class_images))
    return TrainingData(concept, prior, rows, digest([*captioned.images, *class_images]))


def _class_images(base: Base, settings: Training, accelerator: Accelerator, side: int) -> tuple[TrainingImage, ...]:
    if not settings.has_prior:
        return ()
    if settings.class_count and accelerator.is_main_process:
        generate_class_images(base, accelerator, settings, side)
    accelerator.wait_for_everyone()
    images = read_images(settings.class_folder, [settings.filled(prompt) for prompt in settings.class_prompts])
    warn_of_small(images, side)
    for image in images:
        check_class_caption(image.caption, settings.concept)
    return images


def adapt(base: Base, settings: Training, rows: WordFeatures | None) -> Adapter:
    """Gives the network its LoRA, with the mask and the keys that TARA asks for."""
    network = base.network
    config, tara = add_lora(network, base.targets(settings), settings), settings.tara
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.compile:
        network.compile_repeated_blocks(dynamic=False)
    if tara is None:
        return Adapter(config)
    focus = focus_on_triggers(network, ADAPTER, in_training=tara.token_mask == "training")
    if rows is None:
        return Adapter(config, focus)
    alignment = Alignment.of(network, ADAPTER, rows, tara.align_norm)
    if tara.keys == "tied":
        alignment.freeze_keys()
        return Adapter(config, focus)
    if tara.start_aligned:
        alignment.set_keys()
    return Adapter(config, focus, alignment if tara.align_weight > 0 else None)
