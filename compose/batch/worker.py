"""An opened model that checks scenes and makes their images."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_compose.compose.batch.results import NO_CHOICE, ChosenMethod
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.generate.making import Made, make_batch, plan
from lora_compose.compose.generate.models import open_model
from lora_compose.pipelines.scene.scene import Run, Scene


@dataclass(frozen=True)
class Worker:
    """A model, opened on a device."""

    pipe: Any
    device: str

    @classmethod
    def open(cls, settings: BatchSettings, device: str) -> "Worker":
        """Opens the model of a batch.

        Raises:
            ValueError: If it cannot be opened, or method, settings or scheduler are unknown.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        run = settings.run(Scene(prompt="-")).model_copy(update={"device": device})
        return cls(open_model(run, settings.save_memory), device)

    def check(self, run: Run) -> ChosenMethod:
        """Plans a call; returns its method with the reason, and raises whatever models and libraries raise."""
        planned = plan(self.pipe, self._here(run))
        return NO_CHOICE if planned is None else (planned.method, planned.choice.reason)

    def make(
        self, run: Run, seeds: Sequence[int], on_progress: Callable[[float], None] | None = None
    ) -> Sequence[Made]:
        """The images of a call."""
        try:
            return make_batch(self.pipe, self._here(run), seeds, on_progress).images
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()  # else the next one, which may be smaller, finds no room either
            raise

    def _here(self, run: Run) -> Run:
        return run.model_copy(update={"device": self.device})


def encoded(images: Iterable[Made]) -> dict[int, bytes]:
    """Images as PNG files with their record, by seed."""
    return {image.record.run.seed: png_bytes(image.image, image.record) for image in images}
