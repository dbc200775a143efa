"""The settings of the page: a run that may still be incomplete, and the page's limits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.generate.defaults import OF_SHIPPED
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.generate.schedulers import scheduler_class
from lora_compose.compose.page.boxes import template
from lora_compose.compose.page.controls import controls
from lora_compose.compose.page.open_models import ModelChoice
from lora_compose.compose.playground.assets import PLAYGROUND, assets_dir, ordinary
from lora_compose.compose.support.frozen import shared
from lora_compose.pipelines.methods import METHODS, make_method, name_of
from lora_compose.pipelines.scene.mask_images import Box
from lora_compose.pipelines.scene.scene import Concept, ControlFile, IPAdapterFile, Run, Scene, check_box
from lora_compose.pipelines.scene.sources import moved_files
from lora_compose.pipelines.support.field_errors import FieldError

MOST_CONCEPTS = 12
MOST_SEEDS = 16
MOST_STEPS = 200
MOST_TEXT = 2000  # characters of a prompt
MOST_NAME = 60
SIDES = (64, 2048)  # pixels
FACTORS = (0.7, 0.85, 1.15, 1.3)
"""On the weights, of the variations of an image."""
_MOST_WHOLE = 2**53 - 1
_LARGER = 4  # times the side that a model was made for

EXAMPLE = ("bear-robot", 4)
"""Scene and seed of the filled-in example, in which both subjects are right."""


@dataclass(frozen=True)
class Form:
    """All settings of the page.

    Attributes:
        size: Width and height of the image in pixels.
        concepts: As in `Scene`; regions are kept in them also while `boxed` is off.
        boxed: Whether regions count.
        mask_image: As in `Scene`; the page paints nothing outside of it.
    """

    choice: ModelChoice
    prompt: str
    size: tuple[int, int]
    negative_prompt: str = ""
    concepts: tuple[Concept, ...] = ()
    boxed: bool = False
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    steps: int = OF_SHIPPED[0]
    guidance_scale: float = OF_SHIPPED[1]
    seeds: tuple[int, ...] = (0,)
    image: str | None = None
    mask_image: str | None = None
    strength: float | None = None
    references: tuple[str, ...] = ()
    controls: tuple[ControlFile, ...] = ()
    ip_adapters: tuple[IPAdapterFile, ...] = ()

    def runs(self) -> list[Run]:
        """A run for every seed. Raises ValueError with everything that is wrong, a line each."""
        check_limits(self)
        concepts = self.concepts
        if not self.boxed:
            concepts = tuple(concept.model_copy(update={"region": None}) for concept in concepts)
        try:
            width, height = self.size
            scene = Scene(**shared(
                Scene.model_fields.keys() - {"padding_mask_crop"}, self, concepts=concepts, width=width, height=height,
                paste_original=True if self.mask_image is not None else None,
            ))  # fmt: skip
            given = shared(Run.model_fields.keys() - {"scene", "seed"}, self.choice, self)
            return [Run(**given, scene=scene, seed=seed) for seed in self.seeds]
        except FieldError as error:
            raise ValueError("\n".join(error.messages)) from error

    def with_method(self, method: str) -> "Form":
        """The form with another method at its defaults."""
        return replace(self, method=method, settings=self.settings if method == self.method else {})


def form_of(run: Run, size: tuple[int, int]) -> Form:
    """The form that reproduces a run on the page.

    Args:
        run: From a record or an example; its model is the page's from now on.
        size: The model's own, for sizes that the scene leaves open.

    Raises:
        ValueError: If it is beyond the page's limits, a box leaves a canvas of the model's own size, or its method,
            settings or scheduler are unknown.
    """
    if run.settings and run.method is None:
        raise ValueError(f"It has the settings {', '.join(run.settings)}, but no method for them.")
    if run.method is not None and not run.scene.concepts:
        raise ValueError(f"It has the method {run.method}, but no concepts.")
    if run.scheduler is not None:
        scheduler_class(run.scheduler)
    method, settings = (None, {}) if run.method is None else name_of(make_method(run.method, run.settings))
    for control in controls(method) if method is not None else ():
        value = settings.get(control.name, 0)
        if control.kind == "whole" and abs(value) > _MOST_WHOLE:
            raise ValueError(f"{control.name} is {value}; a browser counts to {_MOST_WHOLE}.")
    form = Form(**shared(
        (each.name for each in fields(Form)), run.scene, run,
        choice=ModelChoice(run.model, run.dtype, run.device, quantize=run.quantize),
        boxed=any(concept.region is not None for concept in run.scene.concepts),
        size=(run.scene.width or size[0], run.scene.height or size[1]),
        method=method, settings=settings, seeds=(run.seed,),
        mask_image=run.scene.mask_image if isinstance(run.scene.mask_image, str) else None,
    ))  # fmt: skip
    for concept in run.scene.concepts:
        try:
            check_box(concept, *form.size)
        except ValueError as error:
            open_first = "" if run.scene.width and run.scene.height else f"; open the model {run.model} first"
            raise ValueError(f"{error}{open_first}") from error
    check_limits(form)
    return form


def check_limits(form: Form) -> None:
    """Raises ValueError for settings that are too much for a page that several people use."""
    width, height = form.size
    texts = [form.prompt, form.negative_prompt]
    texts += [text or "" for concept in form.concepts for text in (concept.prompt, concept.negative_prompt)]
    beyond = [
        (len(form.concepts) > MOST_CONCEPTS, f"{len(form.concepts)} concepts are too many; the page takes "
         f"{MOST_CONCEPTS}."),
        (max(map(len, texts)) > MOST_TEXT, f"A prompt may have at most {MOST_TEXT} characters; a model reads fewer."),
        (not form.prompt.strip(), "Write a prompt."),
        (not all(SIDES[0] <= side <= SIDES[1] and side % 8 == 0 for side in form.size),
         f"{width} x {height} pixels: each side has {SIDES[0]} to {SIDES[1]} pixels, a multiple of 8."),
        (not 1 <= form.steps <= MOST_STEPS, f"{form.steps} steps; the page takes 1 to {MOST_STEPS}."),
        (len(form.seeds) > MOST_SEEDS, f"{len(form.seeds)} seeds are too many at once; the page takes "
         f"{MOST_SEEDS}."),
        (any(len(text or "") > MOST_NAME for concept in form.concepts
             for text in (concept.name, concept.trigger, concept.class_word)),
         f"A name, a trigger and a class word may have {MOST_NAME} letters each."),
        (form.method is not None and form.method not in METHODS, f"There is no method {form.method!r}."),
    ]  # fmt: skip
    if wrong := [words for is_beyond, words in beyond if is_beyond]:
        raise ValueError("\n".join(wrong))


def check_canvas(size: tuple[int, int], own: tuple[int, int]) -> None:
    """Raises ValueError for a canvas that is far from what the model was made for, and would take very long."""
    most = _LARGER * max(own)
    if max(size) > most:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels are far too many for a model made for {own[0]} x {own[1]}; "
            f"the page takes up to {most} for each side."
        )


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds as they are typed: "0, 1, 2" or "5-8"; raises ValueError for anything else; the message shows how."""
    seeds: list[int] = []
    for part in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part)
        if match is None or int(match[2] or match[1]) >= 2**63:
            raise ValueError(f"Seeds are whole numbers such as “0, 1, 2” or “5-8”, not “{part[:40]}”.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST_SEEDS:
            raise ValueError(f"“{part}” is no range of at most {MOST_SEEDS} seeds.")
        seeds += range(first, last + 1)
    if not seeds:
        raise ValueError("Write a seed: a whole number, such as 0. The same seed reproduces the image.")
    return tuple(dict.fromkeys(seeds))


def variations(run: Run) -> list[Run]:
    """Runs from the start noise of an image, with other weights of its LoRAs; none if no weight is one number."""

    def times(concept: Concept, factor: float) -> Concept:
        weight = constant_weight(concept)
        return concept if weight is None else concept.model_copy(update={"weight": round(weight * factor, 4)})

    if all(constant_weight(concept) is None for concept in run.scene.concepts):
        return []
    scenes = [
        run.scene.model_copy(update={"concepts": tuple(times(concept, factor) for concept in run.scene.concepts)})
        for factor in FACTORS
    ]
    return [run.model_copy(update={"scene": scene}) for scene in scenes]


def constant_weight(concept: Concept) -> float | None:
    """The weight of a concept's LoRA; None if it changes over the steps, and for a bystander, which has no LoRA."""
    if concept.is_bystander:
        return None
    weight = 1.0 if concept.weight is None else concept.weight
    return weight if isinstance(weight, int | float) else None


def free_name(wanted: str, taken: Sequence[str]) -> str:
    """A similar name that is not taken."""
    wanted = wanted.strip()[: MOST_NAME - 4] or "concept"
    names = [wanted, *(f"{wanted} {number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


@cache
def example() -> Form:
    """Two concepts of the playground, in boxes, ready to be made."""
    name, seed = EXAMPLE
    scene, size = read_scene(assets_dir() / "scenes" / f"{name}.yaml"), facts_of(PLAYGROUND).own_size
    assert size is not None
    boxes: list[Box] = template("Side by side", len(scene.concepts), *size)
    concepts = tuple(
        concept.model_copy(update={"lora": moved_files(concept.lora, ordinary), "region": box})
        for concept, box in zip(scene.concepts, boxes, strict=True)
    )
    return Form(
        ModelChoice(PLAYGROUND), scene.prompt, size, concepts=concepts, boxed=True, seeds=(seed,)
    )  # fmt: skip
