"""LoRAs of a published suite that are trained here, for subjects that have public images and no public LoRA."""

import gc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator

from lora_compose.compose.evaluation.planning import fingerprint
from lora_compose.compose.evaluation.results import CLAIMS
from lora_compose.compose.evaluation.suite import Suite, SuiteConcept
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.generate.facts import digest, file_hash
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.terminal import bar, echo, err
from lora_compose.compose.training.data import read_images
from lora_compose.compose.training.loop import DivergedError, Stopped, train
from lora_compose.compose.training.model import preset_of
from lora_compose.compose.training.settings import Training
from lora_compose.pipelines.support.field_errors import field_messages
from lora_compose.pipelines.support.home import expanded

FOLDER = "loras"
TRIED = 3
"""Steps of a training that is tried out: the first warms up, and the others give the pace."""
_OWN = ("images", "out", "trigger", "class_word", "model", "steps")
_WAIT = 5.0  # seconds between looks at LoRAs that other processes train


class Trained(Frozen):
    """A LoRA that is trained for the suite, with the trigger and the class word of the concept that names it.

    Attributes:
        images: A folder with images of the concept, or the name of a download.
        model: The model that is trained; None is the suite's.
        steps: Optimisation steps.
        settings: Further fields of `Training` that differ from the preset of the model.
    """

    images: Annotated[str, Field(min_length=1)]
    model: str | None = None
    steps: Annotated[int, Field(ge=TRIED)] = 1000
    settings: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [name for name in Training.model_fields if name not in _OWN]
        if unknown := sorted(self.settings.keys() - set(known)):
            raise ValueError(f"unknown setting {unknown[0]!r} of a training; there are {', '.join(known)}")
        return self


@dataclass(frozen=True)
class _Planned:
    """A training, the name of its LoRA in the suite, and its settings, whose `out` is where the LoRA will be."""

    name: str
    settings: Training

    @property
    def is_left(self) -> bool:
        return not self.settings.out.is_file()


def with_loras(suite: Suite, trained: Mapping[str, Trained], out: Path) -> Suite:
    """The suite with the files of its trained LoRAs; those that are not there are trained.

    A stopped training goes on. Processes that share the folder each take another training. Raises ValueError if images
    or settings cannot be used, and OSError if a LoRA cannot be written.
    """
    planned, claims = list(_planned(suite, trained, out)), Claims(out / CLAIMS)
    while left := [plan for plan in planned if plan.is_left]:
        if not any(_train_claimed(plan, claims) for plan in left):
            sleep(_WAIT)  # others train what is left
    return _located(suite, {plan.name: plan.settings.out for plan in planned})


def tried_loras(suite: Suite, trained: Mapping[str, Trained], out: Path) -> Suite:
    """The suite with LoRAs of a few steps for missing ones; shows their training's time. Errors: as `with_loras`."""
    paths, seconds, steps = {}, 0.0, 0
    for plan in _planned(suite, trained, out):
        paths[plan.name] = plan.settings.out
        if not plan.is_left:
            continue
        tried = plan.settings.model_copy(update={
            "out": out / "smoke" / FOLDER / plan.settings.out.name, "steps": TRIED, "warmup": 0, "sample_every": 0,
        })  # fmt: skip
        moments: list[float] = []
        _train(tried, f"trying the training of {plan.name}", moments, fresh=True)
        pace = (moments[-1] - moments[0]) / (TRIED - 1)
        echo(f"  {plan.name}: {pace:.2g} s for each of {plan.settings.steps} steps of its training")
        paths[plan.name] = tried.out
        seconds, steps = seconds + pace * plan.settings.steps, steps + plan.settings.steps
    if steps:
        echo(f"Training, {steps} steps in all: about {seconds / 3600:.2g} h at this pace, one LoRA after the other")
    return _located(suite, paths)


def _planned(suite: Suite, trained: Mapping[str, Trained], out: Path) -> Iterator[_Planned]:
    for concept in suite.concepts:
        for source in concept.loras.values():
            if source in trained:
                yield _Planned(source, _settings(source, trained[source], suite, concept, out.absolute() / FOLDER))


def _settings(name: str, trained: Trained, suite: Suite, concept: SuiteConcept, folder: Path) -> Training:
    """The settings of a training; its file has a hash of all that the LoRA depends on.

    Raises:
        ValueError: If images or settings cannot be used.
    """
    model = suite.model if trained.model is None else trained.model
    fields = {
        "images": expanded(trained.images), "out": folder / "lora.safetensors", "model": model,
        "trigger": concept.trigger, "class_word": concept.class_word, "steps": trained.steps,
        "cpu": choose_device(suite.device) == "cpu", "threads": suite.threads, **trained.settings,
    }  # fmt: skip
    try:
        settings = Training.preset(preset_of(model), **fields)
    except ValidationError as error:
        raise ValueError(f"training {name!r}: {'; '.join(field_messages(Training, error))}") from error
    images = [
        [image.caption, file_hash(str(image.path))]
        for image in read_images(settings.images, [settings.filled(settings.prompt)])
    ]
    facts = settings.model_dump(mode="json", exclude={"images", "out", "model", "cpu", "checkpoint_every"})
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "lora"
    return settings.model_copy(
        update={"out": folder / f"{slug}-{digest(fingerprint(model), images, facts)}.safetensors"}
    )


def _train_claimed(plan: _Planned, claims: Claims) -> bool:
    """Trains a LoRA unless another process does; whether this process was free to."""
    with claims.claim(plan.settings.out.name) as claim:
        if claim is not None and plan.is_left:
            _train(plan.settings, f"training {plan.name}")
        return claim is not None


def _train(settings: Training, what: str, moments: list[float] | None = None, *, fresh: bool = False) -> None:
    """Trains a LoRA with progress; `moments` gets the time after each step."""
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with bar(what, settings.steps) as on_progress:

        def on_step(step: int, loss: float) -> None:
            if moments is not None:
                moments.append(perf_counter())
            on_progress(step, f"{what}, step {step} of {settings.steps}, loss {loss:.4f}")

        try:
            train(settings, on_step=on_step, fresh=fresh, overwrite=fresh)
        except Stopped as stopped:
            echo(stopped, style="yellow", to=err)
            raise
        except DivergedError as error:
            raise ValueError(f"{what}: {error}") from error
    gc.collect()  # the next model needs the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _located(suite: Suite, paths: Mapping[str, Path]) -> Suite:
    def of(concept: SuiteConcept) -> SuiteConcept:
        kinds = {kind: str(paths.get(source, source)) for kind, source in concept.loras.items()}
        return concept.model_copy(update={"lora": kinds[""] if isinstance(concept.lora, str) else kinds})

    return suite.model_copy(update={"concepts": tuple(map(of, suite.concepts))})
