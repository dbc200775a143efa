"""Likeness of generated objects to their concepts, on the playground, which has reference images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUNDS
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.scene.sources import shown

SUITE = "playground-quick"
"""Whose encoder, detector and reference images are used."""


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
    """The playground's judge, opened at first use."""

    def judges(self, run: Run) -> bool:
        """Whether there are reference images for every LoRA of a run, and it has some."""
        return run.model in PLAYGROUNDS and bool(run.scene.concepts) and bool(self._names(run.scene))

    def score(self, image: Image.Image, scene: Scene) -> dict[str, Likeness]:
        """Scores the concepts with a LoRA in an image of the playground.

        Raises:
            ValueError: If there are no reference images for some of them.
        """
        from lora_compose.compose.evaluation.suite import SuiteScene

        names = self._names(scene)
        if names is None:
            raise ValueError("there are no reference images for every LoRA of this scene")
        suite_scene = SuiteScene(name="page", prompt=scene.prompt, concepts=tuple(names.values()))
        scores = self._scorer.score(image.convert("RGB"), suite_scene)
        return {ours: _likeness(scores.concepts[theirs], theirs) for ours, theirs in names.items()}

    @cached_property
    def _suite(self) -> Any:
        from lora_compose.compose.evaluation.suite import read_suite

        return read_suite(SUITE)

    @cached_property
    def _scorer(self) -> Any:
        from lora_compose.compose.evaluation.scoring import open_scorer

        return open_scorer(self._suite)

    def _names(self, scene: Scene) -> Mapping[str, str] | None:
        """The suite's concepts by ours with a LoRA; None if one of these has no counterpart, or two have the same."""
        theirs = {lora: concept.name for concept in self._suite.concepts for lora in concept.loras.values()}
        ours = [concept for concept in scene.concepts if not concept.is_bystander]
        names = {concept.name: theirs.get(_of_unet(shown(concept.lora))) for concept in ours}
        classes = [name for name in names.values() if name is not None]
        if len(classes) < len(names) or len(set(classes)) < len(classes):
            return None
        return {ours: name for ours, name in names.items() if name is not None}


def _of_unet(lora: str) -> str:
    """The LoRA of the same concept for the playground's UNet, whose reference images serve both."""
    model, colon, name = lora.partition(":")
    return f"{PLAYGROUND}:{name}" if colon and model in PLAYGROUNDS else lora


def _likeness(score: Any, name: str) -> Likeness:
    if name not in score.similarity:
        return Likeness(found=False, own=None, others=None)
    others = [value for other, value in score.similarity.items() if other != name]
    return Likeness(True, score.similarity[name], max(others, default=None))
