"""References of subjects without public photographs: images that a LoRA makes alone, cut to what the detector finds."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from lora_compose.compose.evaluation.batches import Arm, Batch, run_of
from lora_compose.compose.evaluation.detectors import Detector, make_detector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.planning import detector_facts, fingerprint
from lora_compose.compose.evaluation.suite import SANITY, Seeds, Suite, SuiteConcept, SuiteScene
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.generate.facts import digest, run_facts
from lora_compose.compose.generate.making import make_batch
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.processes import own_device
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.terminal import bar
from lora_compose.pipelines.scene.scene import Run

FOLDER = "references"
LEAST = 2
"""Fewest images that make references."""


class Alone(Frozen):
    """Images that the LoRA of a subject makes alone.

    Attributes:
        prompt: Names the subject by its trigger and its class word.
        seeds: Of the images; none of the suite's, so that no image is compared with itself.
    """

    prompt: Annotated[str, Field(min_length=1)]
    seeds: Seeds


def with_references(suite: Suite, alone: Mapping[str, Alone], out: Path) -> Suite:
    """The suite with folders of references, each made unless it is there; `alone` by the source that a concept names.

    Raises:
        ValueError: If a model cannot be opened, or a LoRA makes nothing alone that the detector finds.
        OSError: If the images cannot be written.
    """
    batches = {name: _batch(suite, suite.concept(name), each) for name, each in _named(suite, alone)}
    references = out.absolute() / FOLDER  # the suite is written into a file, whose relative paths begin at its folder
    folders = {name: references / _folder_name(suite, batch) for name, batch in batches.items()}
    if missing := {name: batches[name] for name, folder in folders.items() if not folder.is_dir()}:
        _make(suite, missing, folders)
    concepts = [
        concept.model_copy(update={"references": str(folders[concept.name])}) if concept.name in folders else concept
        for concept in suite.concepts
    ]
    return suite.model_copy(update={"concepts": tuple(concepts)})


def missing_references(suite: Suite, alone: Mapping[str, Alone], out: Path) -> dict[str, int]:
    """How many images `with_references` would make, by the concept whose LoRA makes them."""
    batches = {name: _batch(suite, suite.concept(name), each) for name, each in _named(suite, alone)}
    return {
        name: len(batch.seeds)
        for name, batch in batches.items()
        if not (out / FOLDER / _folder_name(suite, batch)).is_dir()
    }


def _named(suite: Suite, alone: Mapping[str, Alone]) -> Iterator[tuple[str, Alone]]:
    """Concepts whose LoRA makes their references."""
    for concept in suite.concepts:
        if isinstance(concept.references, str) and concept.references in alone:
            yield concept.name, alone[concept.references]


def _batch(suite: Suite, concept: SuiteConcept, alone: Alone) -> Batch:
    like = suite.scenes[0]
    scene = SuiteScene(
        name="alone", prompt=alone.prompt, concepts=(concept.name,), width=like.width, height=like.height,
        negative_prompt=like.negative_prompt,
    )  # fmt: skip
    return Batch(scene, Arm(SANITY[1], alone=concept.name), alone.seeds)


def _folder_name(suite: Suite, batch: Batch) -> str:
    run = run_of(suite, batch)
    facts = run_facts(run, batch.seeds, suite.threads, suite.save_memory)
    return f"{batch.arm.alone}-{digest(fingerprint(run.model), facts, detector_facts(suite))}"


def _make(suite: Suite, batches: Mapping[str, Batch], folders: Mapping[str, Path]) -> None:
    device = own_device(suite.device)
    detector = None
    if suite.detector is not None:
        detector = make_detector(suite.detector, load_encoder(suite.encoder, device), device)
    runs = {name: run_of(suite, batch).model_copy(update={"device": device}) for name, batch in batches.items()}
    pipe = open_model(next(iter(runs.values())), suite.save_memory)
    with bar("references", sum(len(batch.seeds) for batch in batches.values())) as on_progress:
        done = 0
        for name, run in runs.items():
            crops = {}
            for seed in batches[name].seeds:
                crops[seed] = _crop(pipe, run, seed, detector, suite.concept(name).class_word)
                done += 1
                on_progress(done)
            _keep(name, {seed: crop for seed, crop in crops.items() if crop is not None}, folders[name])


def _crop(pipe: Any, run: Run, seed: int, detector: Detector | None, word: str) -> Image.Image | None:
    """The subject of an image; the whole image without a detector, and None if the detector finds none."""
    image = make_batch(pipe, run, (seed,)).images[0].image.convert("RGB")
    if detector is None:
        return image
    return next((image.crop(detection.box) for detection in detector.detect(image, [word])), None)


def _keep(name: str, crops: Mapping[int, Image.Image], folder: Path) -> None:
    if len(crops) < LEAST:
        raise ValueError(
            f"{name}: the detector found its class word in {len(crops)} of the images that its LoRA made alone, and "
            f"references take {LEAST}. Try another prompt, more seeds or a lower threshold of the detector, or give "
            "images as references"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for seed, crop in crops.items():
            write_whole(part / f"{seed}.png", png_bytes(crop))
        if not folder.is_dir():  # another process may have made the same
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
