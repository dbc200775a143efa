"""The rows of a suite's tables (arms), and the batches of images to generate."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_compose.compose.evaluation.suite import SANITY, Suite, SuiteConcept, SuiteMethod, SuiteScene
from lora_compose.compose.playground.assets import lora_source
from lora_compose.compose.support.frozen import shared
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.formats.files import LoraError, trained_with
from lora_compose.pipelines.scene.scene import Concept, Region, Run, Scene
from lora_compose.pipelines.scene.sources import shown
from lora_compose.pipelines.text.tokens import find_words, past


@dataclass(frozen=True)
class Arm:
    """A row of the tables: a method, no LoRA (`method` and `alone` are None), or the LoRA of one concept alone."""

    name: str
    method: SuiteMethod | None = None
    alone: str | None = None
    lora: str | None = None


@dataclass(frozen=True)
class Batch:
    """Images that are made in one call: one scene, one arm, some seeds."""

    scene: SuiteScene
    arm: Arm
    seeds: tuple[int, ...]


def arms(suite: Suite, scene: SuiteScene) -> list[Arm]:
    """The rows of a scene: no LoRA, each LoRA alone, by kind, and the methods."""
    alone = [
        Arm(alone_name(suite, kind), alone=concept, lora=kind or None)
        for kind in suite.kinds
        for concept in scene.concepts
    ]
    return [Arm(SANITY[0]), *alone, *(Arm(m.name, m, lora=m.lora) for m in suite.compared)]


def alone_name(suite: Suite, kind: str) -> str:
    """The name in tables of LoRAs of a kind that act alone."""
    return SANITY[1] if kind == suite.kinds[0] else f"{SANITY[1]}, {kind}"


def batches(suite: Suite) -> Iterator[Batch]:
    """All batches, in the order in which they are made."""
    for scene in suite.scenes:
        for arm in arms(suite, scene):
            for start in range(0, len(suite.seeds), suite.batch_size):
                yield Batch(scene, arm, suite.seeds[start : start + suite.batch_size])


def run_of(suite: Suite, batch: Batch) -> Run:
    """The run of a batch; its seed is that of the first image.

    Raises:
        LoraError: If a LoRA that acts alone has no file.
    """
    scene, arm = batch.scene, batch.arm
    acting = [arm.alone] if arm.alone else list(scene.concepts) if arm.method else []
    concepts = [_concept(suite.concept(name), arm.lora, scene.regions.get(name)) for name in acting]
    if arm.method is not None and arm.method.merge is not None:
        concepts = _merged(suite, scene, arm.method, concepts)
    if arm.method is not None:  # without LoRAs there is nothing to keep off, and one alone acts everywhere
        concepts += [
            Concept(name=name, role="bystander", class_word=word, region=scene.regions.get(name))
            for name, word in scene.bystanders.items()
        ]
    silent = [suite.concept(name) for name in scene.concepts if name not in acting]
    prompt = without_triggers(scene.prompt, silent)
    described = Scene(**shared(Scene.model_fields, scene, prompt=prompt, concepts=tuple(concepts)))
    settings = arm.method.settings if arm.method else {}
    made = {"method": _method(arm, concepts), "settings": settings, "seed": batch.seeds[0]}
    return Run(**shared(Run.model_fields.keys() - {"quantize"}, suite, scene=described, **made))


def _concept(concept: SuiteConcept, kind: str | None, region: Region | None) -> Concept:
    lora = next(iter(concept.loras.values())) if kind is None else concept.loras[kind]
    names = Concept.model_fields.keys() - {"alpha", "merge", "prompt"}  # no suite has these
    return Concept(**shared(names, concept, lora=lora, region=region, references=None))


def _merged(suite: Suite, scene: SuiteScene, method: SuiteMethod, concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts of a scene with all LoRAs of it in one, which for the method `merge` is one concept."""
    further = [_concept(suite.concept(name), method.lora, None) for name in scene.bundle]
    files = tuple(f"{concept.lora}:{concept.weight}" for concept in (*concepts, *further))
    anyhow = any(concept.any_weight for concept in (*concepts, *further)) or None
    bundle: dict[str, Any] = {
        "lora": files, "merge": method.merge, "weight": 1.0, "blocks": None, "any_weight": anyhow,
    }  # fmt: skip
    if method.method == "merge":
        return [Concept(name="+".join(concept.name for concept in (*concepts, *further)), **bundle)]
    return [Concept(**{**dict(concept), **bundle}) for concept in concepts if not suite.concept(concept.name).is_style]


def _method(arm: Arm, concepts: Sequence[Concept]) -> str | None:
    if arm.alone:
        return method_alone(shown(concepts[0].lora))
    return None if arm.method is None else arm.method.method


@lru_cache(maxsize=4096)  # called for every batch, and a hub repository needs a request
def method_alone(lora: str) -> str:
    """The method for a LoRA alone: `tara` if its file says that it was trained for it, otherwise `merge`.

    An unreadable file counts as `merge`; the error comes when images are generated.
    """
    path = find_file(lora_source(lora))
    try:
        return "tara" if trained_with(path) == "tara" else "merge"
    except LoraError:
        return "merge"


def without_triggers(prompt: str, concepts: Sequence[SuiteConcept]) -> str:
    """The prompt with the triggers of some concepts removed: "a sks cat" becomes "a cat"."""
    for concept in concepts:
        for start, end in reversed(find_words(concept.trigger, prompt, concept.class_word)):
            prompt = prompt[:start] + prompt[past(prompt, end) :].lstrip()
    return re.sub(r"\s+", " ", prompt).strip()
