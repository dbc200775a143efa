"""The plan of an evaluation: all batches, under names that change whenever an input of their results changes."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_compose.compose.evaluation.batches import batches, run_of
from lora_compose.compose.evaluation.encoders import JUDGE
from lora_compose.compose.evaluation.results import Plan, Planned
from lora_compose.compose.evaluation.scoring import reference_files
from lora_compose.compose.evaluation.suite import Suite, ZeroShotConfig
from lora_compose.compose.generate.facts import digest, file_hash, model_facts, run_facts
from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_judge, playground_model

SCORING = 1  # incremented whenever the computation of scores changes


def make_plan(suite: Suite) -> Plan:
    """All batches of a suite.

    Images are kept under a hash of the run, the threads and the contents of model and LoRAs; scores under a hash of
    the scene and the contents of encoder, detector and references. So a rerun continues where it stopped, a changed
    suite keeps what is still valid, and outdated results are never used.

    Raises:
        ValueError: If files are missing.
    """
    model, scoring = fingerprint(suite.model), _scoring(suite)
    planned = []
    for batch in batches(suite):
        scene, arm = batch.scene, batch.arm
        made = digest(run_facts(run_of(suite, batch), batch.seeds, suite.threads, suite.save_memory), model)
        names = [scene.name, arm.name, *([arm.alone] if arm.alone else []), str(batch.seeds[0])]
        scored = digest(scene.model_dump(mode="json", exclude={"bundle"}), scoring)
        planned.append(
            Planned(
                key=f"{'-'.join(map(_slug, names))}-{made}", scores=f"scores-{scored}.json", scene=scene.name,
                arm=arm.name, alone=arm.alone, seeds=batch.seeds,
            )
        )  # fmt: skip
    return Plan(suite=suite, batches=tuple(planned))


def _scoring(suite: Suite) -> Any:
    concepts = [
        [concept.name, concept.trigger, concept.class_word, _references(suite, concept.name)]
        for concept in suite.concepts
    ]
    detector = None if suite.detector is None else suite.detector.model_dump(mode="json")
    if isinstance(suite.detector, ZeroShotConfig):
        detector = [detector, fingerprint(suite.detector.model)]
    return [SCORING, fingerprint(suite.encoder), detector, concepts]


def _references(suite: Suite, name: str) -> list[str]:
    return [file_hash(str(path)) for path in _present(reference_files(suite.concept(name)), name)]


def _present(paths: Iterable[Path], concept: str) -> Iterator[Path]:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"concept {concept!r}: the reference image {str(path)!r} is missing")
        yield path


def fingerprint(source: str) -> Any:
    """Identifies a model: by hashes of its files, or by its name if it is a hub repository."""
    path = Path(source).expanduser()
    if source in PLAYGROUNDS:
        path = playground_model(source)
    elif source == JUDGE:
        path = playground_judge()
    return model_facts(path, source)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "_"
