"""An opened model that checks scenes and makes their images."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_compose.compose.batch.jobs import Job
from lora_compose.compose.batch.results import NO_CHOICE, ChosenMethod
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.cluster.packing import Node, Parcel
from lora_compose.compose.files.paths import moved
from lora_compose.compose.generate.making import Made, make_batch, plan
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.processes import own_device
from lora_compose.pipelines.scene.scene import Run


@dataclass(frozen=True)
class Worker:
    """A model, opened on a device of a node, and the files of scenes by their names, unless the node has them."""

    pipe: Any
    device: str
    node: Node
    scenes: Mapping[str, Parcel]

    @classmethod
    def open(cls, settings: BatchSettings, model: Parcel, scenes: Mapping[str, Parcel], node: Node) -> "Worker":
        """Opens the model of a batch, whose files are in a parcel unless the node has them.

        Raises:
            ValueError: If it cannot be opened, or method, settings or scheduler are unknown.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        device = own_device(settings.device)
        run = moved(settings.bare_run, node.unpack(model)).model_copy(update={"device": device})
        return cls(open_model(run, settings.save_memory), device, node, scenes)

    def check(self, job: Job) -> Iterator[ChosenMethod]:
        """Plans a call; yields its method with the reason, and raises whatever models and libraries raise."""
        planned = plan(self.pipe, self._run(job))
        yield NO_CHOICE if planned is None else (planned.method, planned.choice.reason)

    def make(self, job: Job, on_progress: Callable[[float], None] | None = None) -> Iterator[Sequence[Made]]:
        """Yields the images of a call."""
        try:
            yield make_batch(self.pipe, self._run(job), job.seeds, on_progress).images
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()  # else the next one, which may be smaller, finds no room either
            raise

    def _run(self, job: Job) -> Run:
        """The run of a call, with files and the device of this node."""
        here = moved(job.run, self.node.unpack(self.scenes.get(job.entry.name, Parcel())))
        return here.model_copy(update={"device": self.device})
