"""Open models, shared by all sessions. One call at a time per model; the others wait in turn."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lora_compose.attention.device import uncompiled
from lora_compose.compose.benchmark.counting import Counted
from lora_compose.compose.generate.defaults import defaults_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUNDS, lora_source
from lora_compose.compose.support.savers import OFFLOADS, Saver
from lora_compose.pipelines.concepts.loading import Factors
from lora_compose.pipelines.families.references import ReferencesPipeline
from lora_compose.pipelines.formats.keys import PARTS
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.scene.sources import moved_files

LIMIT = 2
"""Most open models; the least recently used one is closed first."""

_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text that the UNet reads


class Stopped(Exception):  # noqa: N818 (nothing has gone wrong)
    """The user pressed stop."""


class Busy(Exception):  # noqa: N818
    """The model is in use, and the caller does not wait."""


@dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is opened."""

    model: str
    dtype: str = "float32"
    device: str | None = None
    memory: tuple[Saver, ...] = ()
    quantize: str | None = None

    @property
    def offloads(self) -> bool:
        """Whether parts of the model move between devices during a call."""
        return not OFFLOADS.isdisjoint(self.memory)

    def memory_for(self, model: str, device: str | None) -> tuple[Saver, ...]:
        """The options that save memory, if the model is this one, and as far as the device has use for them."""
        if model != self.model:
            return ()
        return tuple(saver for saver in self.memory if device != "cpu" or saver not in OFFLOADS)


class OpenModel:
    """An open model with its queue.

    Attributes:
        defaults: Steps and guidance of the model.
        scheduler: The class of the model's own scheduler.
        seconds_per_flop: Of the last image; None before the first one.
        costs: What checks have counted, for all sessions.
    """

    def __init__(self, choice: ModelChoice, pipe: Any, defaults: tuple[int, float]) -> None:
        self.choice, self.defaults = choice, defaults
        self.scheduler = type(pipe.scheduler).__name__
        self.seconds_per_flop: float | None = None
        self.costs: dict[str, Counted] = {}
        self._pipe = pipe
        self._models = _without_weights(pipe)
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that reads prompts, which may be used without a turn."""
        return self._pipe.tokenizer if "unet" in self._pipe.components else self._pipe.tokenizers_for(())[0]

    @property
    def reads_references(self) -> bool:
        """Whether it reads reference images."""
        return isinstance(self._pipe, ReferencesPipeline)

    @property
    def busy(self) -> bool:
        """Whether the model is in use."""
        return bool(self._queue)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the model's own images."""
        return self._pipe.own_size

    @property
    def cell(self) -> int:
        """Sides of images are multiples of so many pixels."""
        return self._pipe.cell

    def size_from_start(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at which it works on an image of this size."""
        return self._pipe.size_from_start(width, height)

    @property
    def family(self) -> str | None:
        """The model family, named as by `guess_family`; None if it is unknown."""
        if self.choice.model in PLAYGROUNDS:
            return self.choice.model
        if "unet" not in self._pipe.components:
            return self._pipe.family
        return _FAMILIES.get(self._pipe.unet.config.cross_attention_dim)

    def read(self, concept: Concept) -> Factors:
        """Reads a concept's file without a turn, so that a run need not. LoraError or OSError if it is unusable."""
        return self._pipe.library.read_ahead(self._models, concept, self._pipe.concept_memory)

    @contextmanager
    def turn(
        self,
        concepts: Sequence[Concept],
        *,
        wait: bool = True,
        stop: threading.Event | None = None,
        on_wait: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """The pipeline, for this thread alone inside the block; only these concepts' LoRAs stay loaded in it.

        A LoRA whose file has changed is read again. `on_wait` gets the number of calls ahead. Raises Busy if the model
        is in use and `wait` is False, and Stopped if `stop` was set before the turn came.
        """
        ticket = object()
        with self._changed:
            if self._queue and not wait:
                raise Busy
            self._queue.append(ticket)
        try:
            self._await(ticket, stop, on_wait)
            _unload_others(self._pipe, concepts)
            yield self._pipe
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _await(self, ticket: object, stop: threading.Event | None, on_wait: Callable[[int], None] | None) -> None:
        with self._changed:
            while self._queue[0] is not ticket:
                if stop is not None and stop.is_set():
                    raise Stopped
                if on_wait is not None:
                    on_wait(self._queue.index(ticket))
                self._changed.wait(0.1)


class OpenModels:
    """The models that are open."""

    def __init__(self) -> None:
        self._models: OrderedDict[ModelChoice, OpenModel] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()

    def open(self, choice: ModelChoice) -> OpenModel:
        """Opens a model, unless it is open. ModelError if there is none of ours, ValueError for device or precision.

        Models are opened one after the other, since two might not fit into memory; calls for an open one do not wait.
        """
        if (known := self._known(choice)) is not None:
            return known
        with self._opening:
            if (known := self._known(choice)) is not None:
                return known
            self._make_room()
            run = Run(
                scene=Scene(prompt="-"),
                model=choice.model,
                dtype=choice.dtype,
                device=choice.device,
                quantize=choice.quantize,
            )
            chosen = defaults_of(run)
            defaults = chosen.steps, float(chosen.guidance_scale)
            opened = OpenModel(choice, open_model(run, choice.memory), defaults)
            with self._lock:
                self._models[choice] = opened
            return opened

    def _known(self, choice: ModelChoice) -> OpenModel | None:
        with self._lock:
            if choice in self._models:
                self._models.move_to_end(choice)
            return self._models.get(choice)

    def _make_room(self) -> None:
        with self._lock:
            idle = [other for other, model in self._models.items() if not model.busy]
            for other in idle[: max(0, len(self._models) - LIMIT + 1)]:
                del self._models[other]  # whoever still shows it keeps it alive until then


def _without_weights(pipe: Any) -> SimpleNamespace:
    """The models that LoRAs change, as they are between calls, by name: layers and shapes without values."""
    models = {}
    for part in PARTS:
        if (given := getattr(pipe, part, None)) is None:
            continue
        model: Any = uncompiled(given)
        with torch.device("meta"):
            new = getattr(type(model), "from_config", type(model))  # of diffusers, or of transformers
            models[part] = new(model.config)
    return SimpleNamespace(**models)


def _unload_others(pipe: Any, concepts: Sequence[Concept]) -> None:
    wanted = {(concept.name, moved_files(concept.lora, lora_source), concept.merge) for concept in concepts}
    for name, known in list(pipe.concepts.items()):
        if (name, known.lora, known.merge) not in wanted or pipe.library.is_outdated(name):
            pipe.unload_concept(name)
