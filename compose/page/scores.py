"""Likeness of generated objects to their concepts, on the playgrounds, which have reference images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_FLUX
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.scene.sources import shown

SUITES: Mapping[str, str] = {PLAYGROUND: "playground-quick", PLAYGROUND_FLUX: "playground-flux"}
"""Suites whose encoder, detector and reference images are used, by model."""


@dataclass(frozen=True)
class Likeness:
    """The judge's scores of one concept in an image.

    Attributes:
        found: Whether an object of its class was found at all.
        own: Cosine similarity of that object to the concept's reference images.
        others: The highest to those of another concept of the scene; None if it is alone.
    """

    found: bool
    own: float | None
    others: float | None

    @property
    def words(self) -> str:
        """The scores as short text, for a table."""
        if not self.found or self.own is None:
            return "not found"
        beside = "" if self.others is None else f", others {self.others:.2f}"
        return f"{self.own:.2f}{beside}"


class Judge:
    """The judges of the playgrounds, opened at first use."""

    def __init__(self) -> None:
        self._suites: dict[str, Any] = {}
        self._scorers: dict[str, Any] = {}

    def judges(self, run: Run) -> bool:
        """Whether there are reference images for every LoRA of a run, and it has some."""
        return run.model in SUITES and bool(run.scene.concepts) and bool(self._names(run.model, run.scene))

    def score(self, image: Image.Image, run: Run) -> dict[str, Likeness]:
        """Scores the concepts in an image of a playground. Raises ValueError if one has no reference images."""
        from lora_compose.compose.evaluation.scoring import open_scorer
        from lora_compose.compose.evaluation.suite import SuiteScene

        names = self._names(run.model, run.scene)
        if names is None:
            raise ValueError("there are no reference images for every LoRA of this scene")
        if run.model not in self._scorers:
            self._scorers[run.model] = open_scorer(self._suite(run.model))
        scene = SuiteScene(name="page", prompt=run.scene.prompt, concepts=tuple(names.values()))
        scores = self._scorers[run.model].score(image.convert("RGB"), scene)
        return {ours: _likeness(scores.concepts[theirs], theirs) for ours, theirs in names.items()}

    def _suite(self, model: str) -> Any:
        from lora_compose.compose.evaluation.suite import read_suite

        if model not in self._suites:
            self._suites[model] = read_suite(SUITES[model])
        return self._suites[model]

    def _names(self, model: str, scene: Scene) -> Mapping[str, str] | None:
        """The suite's concepts by ours with a LoRA; None if one of these has no counterpart, or two have the same."""
        theirs = {lora: concept.name for concept in self._suite(model).concepts for lora in concept.loras.values()}
        ours = [concept for concept in scene.concepts if not concept.is_bystander]
        names = {concept.name: theirs.get(shown(concept.lora)) for concept in ours}
        classes = [name for name in names.values() if name is not None]
        if len(classes) < len(names) or len(set(classes)) < len(classes):
            return None
        return {ours: name for ours, name in names.items() if name is not None}


def _likeness(score: Any, name: str) -> Likeness:
    if name not in score.similarity:
        return Likeness(found=False, own=None, others=None)
    others = [value for other, value in score.similarity.items() if other != name]
    return Likeness(True, score.similarity[name], max(others, default=None))
