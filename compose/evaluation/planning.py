"""The plan of an evaluation: all batches, under names that change whenever an input of their results changes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_compose.compose.evaluation.batches import Batch, batches, run_of
from lora_compose.compose.evaluation.encoders import JUDGE
from lora_compose.compose.evaluation.results import Plan, Planned
from lora_compose.compose.evaluation.scoring import reference_files
from lora_compose.compose.evaluation.suite import Suite, ZeroShotConfig
from lora_compose.compose.playground.assets import PLAYGROUND, lora_source, playground_judge, playground_model
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.regular import sha256_of

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
        made = _hash(_run_facts(suite, batch), model)
        names = [scene.name, arm.name, *([arm.alone] if arm.alone else []), str(batch.seeds[0])]
        scored = _hash(scene.model_dump(mode="json"), scoring)
        planned.append(
            Planned(
                key=f"{'-'.join(map(_slug, names))}-{made}", scores=f"scores-{scored}.json", scene=scene.name,
                arm=arm.name, alone=arm.alone, seeds=batch.seeds,
            )
        )  # fmt: skip
    return Plan(suite=suite, batches=tuple(planned))


def _run_facts(suite: Suite, batch: Batch) -> Any:
    run = run_of(suite, batch).model_dump(mode="json", exclude={"model", "device", "seed"})
    for concept in run["scene"]["concepts"]:
        concept["lora"] = _file_hash(str(find_file(lora_source(concept["lora"]))))
    settings = vars(make_method(run["method"], run["settings"])) if run["method"] else {}
    complete = {name: repr(value) for name, value in settings.items()}  # defaults may change from version to version
    return [run, complete, batch.seeds, suite.threads, *suite.save_memory]


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
    return [_file_hash(str(path)) for path in _present(reference_files(suite.concept(name)), name)]


def _present(paths: Iterable[Path], concept: str) -> Iterator[Path]:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"concept {concept!r}: the reference image {str(path)!r} is missing")
        yield path


def fingerprint(source: str) -> Any:
    """Identifies a model: by hashes of its files, or by its name if it is a hub repository."""
    known = {PLAYGROUND: playground_model, JUDGE: playground_judge}
    path = known[source]() if source in known else Path(source).expanduser()
    if path.is_file():
        return _file_hash(str(path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".json", ".txt", ".model"))
        return [[file.relative_to(path).as_posix(), _file_hash(str(file))] for file in files]
    return source


@lru_cache(maxsize=4096)
def _file_hash(path: str) -> str:
    return sha256_of(Path(path))


def _hash(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "_"
