"""Images that the model generates for a training: samples, and images of the class."""

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from PIL import Image

from lora_compose.compose.files.images import save_image
from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.batches import generator
from lora_compose.compose.training.focus import Focus
from lora_compose.compose.training.model import on_device
from lora_compose.compose.training.settings import Training
from lora_compose.pipelines.scene.mask_images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

_TOGETHER = 4  # class images generated in one call
_SAMPLE, _CLASS_IMAGE = range(100, 102)  # tell their noise apart from that of training


def save_samples(
    base: Base,
    accelerator: Accelerator,
    settings: Training,
    prompts: Sequence[tuple[str, Sequence[int]]],
    focus: Focus | None,
    step: int,
    side: int,
    references: Sequence[Image.Image],
) -> None:
    """Generates the samples of a step, always from the same noise and references, into a folder next to the output.

    Prompts come with the token positions of the trigger; the mask is set on the prompt's row, not on the negative
    prompt's.
    """
    folder = settings.out.with_name(f"{settings.out.stem}-samples")
    guided = settings.sample_guidance > 1
    base.network.eval()
    with on_device(base.pipe.components.values(), accelerator.device):
        for number, (prompt, positions) in enumerate(prompts):
            if focus is not None:
                tokens = base.pipe.tokenizer.model_max_length
                focus.mask = torch.zeros(2 if guided else 1, tokens, 1, device=accelerator.device)
                focus.mask[-1, list(positions)] = 1
            noise = generator(settings.seed, _SAMPLE, number)
            (image,) = base.generate(accelerator, [prompt], [noise], 25, settings.sample_guidance, side, references)
            save_image(image, folder / f"{step:06}-{number}.png")
    base.network.train()


def generate_class_images(base: Base, accelerator: Accelerator, settings: Training, side: int) -> None:
    """Generates class images with captions by the base model, up to the number in the settings."""
    folder = settings.class_folder
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    missing = [number for number in range(settings.class_count) if not (folder / _name(number)).exists()]
    missing = missing[: max(0, settings.class_count - there)]
    if missing:
        logger.info("the model generates %d class images into %s, for prior preservation", len(missing), folder)
    with on_device(base.pipe.components.values() if missing else (), accelerator.device):
        _generate(base, accelerator, settings, side, missing)


def _generate(base: Base, accelerator: Accelerator, settings: Training, side: int, missing: Sequence[int]) -> None:
    folder = settings.class_folder
    for first in range(0, len(missing), _TOGETHER):
        numbers = missing[first : first + _TOGETHER]
        prompts = [settings.filled(settings.class_prompts[n % len(settings.class_prompts)]) for n in numbers]
        noise = [generator(settings.seed, _CLASS_IMAGE, number) for number in numbers]
        images = base.generate(accelerator, prompts, noise, settings.class_steps, settings.sample_guidance, side)
        for number, prompt, image in zip(numbers, prompts, images, strict=True):
            path = folder / _name(number)
            path.with_suffix(".txt").write_text(f"{prompt}\n", encoding="utf-8")
            save_image(image, path)


def _name(number: int) -> str:
    return f"class-{number:04}.png"
