"""Raw scores of an image: finds the concepts, crops them, and compares them with their references."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from lora_compose.compose.evaluation.batches import without_triggers
from lora_compose.compose.evaluation.chosen import Chosen
from lora_compose.compose.evaluation.confusion import by_place, truth_matrix
from lora_compose.compose.evaluation.detectors import Detection, Detector, make_detector
from lora_compose.compose.evaluation.encoders import IMAGES_AND_TEXTS, Encoder, family_of, load_encoder
from lora_compose.compose.evaluation.faces import FaceEncoder
from lora_compose.compose.evaluation.metrics import assign, clip_i, clip_t, similarity_matrix
from lora_compose.compose.evaluation.results import ConceptScore, Features, ImageScores
from lora_compose.compose.evaluation.suite import Suite, SuiteConcept, SuiteScene
from lora_compose.compose.files.reading import read_whole
from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_references
from lora_compose.pipelines.scene.mask_images import IMAGE_SUFFIXES, Box, on_white, upright_image
from lora_compose.pipelines.scene.scene import head_noun_of
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.regular import open_regular

logger = logging.getLogger(__name__)

CAPTIONS = "captions.tsv"
"""The file beside reference images that may say where in them the concept is."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """An encoder, and the reference images by concept as it embeds them. Shape: [images, channels] each.

    There are none of a concept whose references show no face, if the encoder reads faces.
    """

    encoder: Encoder | FaceEncoder
    references: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores images of a suite; without a detector, concepts are taken from the regions of the scenes.

    `references` has the embedded reference images by concept. Shape: [images, channels] each. `chosen` has what the
    metrics that the user chose compare with, by name.
    """

    suite: Suite
    encoder: Encoder
    detector: Detector | None
    references: Mapping[str, Tensor]
    chosen: Mapping[str, Embedded] = field(default_factory=dict)

    def truth(self, scene: SuiteScene) -> dict[str, dict[str, float]]:
        """How alike the references of a scene's subjects are among themselves: `confusion.truth_matrix` by name."""
        names = [name for name in scene.concepts if not self.suite.concept(name).is_style]
        matrix = truth_matrix([self.references[name] for name in names])
        return {
            name: dict(zip(names, map(_rounded, row), strict=True)) for name, row in zip(names, matrix, strict=True)
        }

    def score(self, image: Image.Image, scene: SuiteScene) -> ImageScores:
        """Measures an image of a scene."""
        all_concepts = [self.suite.concept(name) for name in scene.concepts]
        concepts = [concept for concept in all_concepts if not concept.is_style]
        names = [concept.name for concept in concepts]
        nouns = [*(concept.class_word for concept in concepts), *scene.bystanders.values()]
        regions = [scene.regions[name] for name in (*names, *scene.bystanders) if scene.regions]
        references = [self.references[name] for name in names]
        whole = self.encoder.images([image])
        detections = self._detected(image, nouns, regions)
        crops = [squared(image.crop(detection.box)) for detection in detections]
        similarity = similarity_matrix(self.encoder.images(crops), references)  # [findings, concepts]
        rows = [dict(zip(names, map(_rounded, row), strict=True)) for row in similarity]
        classes, seen = map(head_noun_of, nouns), [head_noun_of(detection.word) for detection in detections]
        allowed = np.array([[word == of_subject for word in seen] for of_subject in classes], dtype=bool)
        allowed = allowed.reshape(len(nouns), len(detections))
        # A bystander has no references: of its class, it gets what is least like a concept, after the concepts.
        unlike = np.repeat(-2 - similarity.max(axis=1, keepdims=True), len(scene.bystanders), axis=1)
        every = self._chosen(np.hstack([similarity, unlike]), allowed)
        slots = self._slots(detections, regions, every, allowed)[: len(concepts)]
        chosen, others = every[: len(concepts)], every[len(concepts) :]
        scores = {}
        for concept, i, slot, own_references in zip(concepts, chosen, slots, references, strict=True):
            of_crop = {} if i is None else self._found(detections[i], rows[i], scene.regions.get(concept.name))
            alike, row = _rounded(clip_i(whole, own_references)[0]), {} if slot is None else rows[slot]
            scores[concept.name] = ConceptScore(whole=alike, slot=row, **of_crop)
        for style in (concept for concept in all_concepts if concept.is_style):
            alike = _rounded(clip_i(whole, self.references[style.name])[0])
            scores[style.name] = ConceptScore(whole=alike, colours=colours_of(image))
        extra = None if self.detector is None else len(detections) - sum(i is not None for i in every)
        prompt = without_triggers(scene.prompt, all_concepts)
        own_crops = {concept.name: crops[i] for concept, i in zip(concepts, chosen, strict=True) if i is not None}
        by_model = {
            id(metric): _features(metric, image, prompt, scene.concepts, own_crops) for metric in self.chosen.values()
        }
        return ImageScores(
            clip_t=_clip_t(self.encoder, whole, prompt),
            concepts=scores,
            extra=extra,
            bystanders={name: {} if i is None else rows[i] for name, i in zip(scene.bystanders, others, strict=True)},
            chosen={name: by_model[id(metric)] for name, metric in self.chosen.items()},
        )

    def _detected(self, image: Image.Image, nouns: Sequence[str], regions: Sequence[Box]) -> list[Detection]:
        """Findings of the detector; without one, each subject's region, in the order of their nouns."""
        if self.detector is not None:
            return self.detector.detect(image, nouns)
        return [Detection(noun, region, 1.0) for noun, region in zip(nouns, regions, strict=True)]

    def _chosen(self, similarity: np.ndarray, allowed: np.ndarray) -> list[int | None]:
        """The finding of each subject: at most one, of its own class, by likeness to its references."""
        return list(range(len(allowed))) if self.detector is None else assign(similarity.T, allowed)

    def _slots(
        self, detections: Sequence[Detection], regions: Sequence[Box], chosen: list[int | None], allowed: np.ndarray
    ) -> list[int | None]:
        """The findings of the subjects; those of one class go to the subjects in whose places they are.

        By likeness, two subjects of one class would never be swapped. Where there are no places, it has to do.
        """
        if self.detector is None or not regions:
            return chosen
        taken = np.isin(np.arange(len(detections)), [i for i in chosen if i is not None])
        return by_place([detection.box for detection in detections], regions, allowed & taken)

    def _found(self, detection: Detection, similarity: Mapping[str, float], region: Box | None) -> dict[str, Any]:
        """Fields of the score of a concept that was found; without a detector it is where its region is."""
        score: dict[str, Any] = {"box": detection.box, "similarity": similarity}
        if self.detector is None:
            return score
        return score | {"detection": detection.score, "placed": region and _placed(detection.box, region)}


def open_scorer(suite: Suite, device: str = "cpu") -> Scorer:
    """Opens encoders, detector and references of a suite. Raises ValueError if one of them cannot be opened."""
    crops = {concept.name: reference_crops(concept) for concept in suite.concepts}
    opened: dict[str, Embedded] = {}

    def embedded(source: str) -> Embedded:
        if source not in opened:
            encoder = load_encoder(source, device)
            opened[source] = Embedded(encoder, {name: encoder.images(images) for name, images in crops.items()})
        return opened[source]

    encoder = load_encoder(suite.encoder, device)
    main = opened[suite.encoder] = Embedded(encoder, {name: encoder.images(images) for name, images in crops.items()})
    detector = None if suite.detector is None else make_detector(suite.detector, encoder, device)
    check_chosen(suite)
    chosen = {
        metric.name: _of_faces(metric, crops) if metric.name == "arcface" else embedded(metric.model)
        for metric in suite.metrics
    }
    return Scorer(suite, encoder, detector, main.references, chosen)


def _of_faces(metric: Chosen, crops: Mapping[str, Sequence[Image.Image]]) -> Embedded:
    """The networks of the metric arcface, and the faces of the references."""
    encoder = FaceEncoder(metric.model, metric.faces)
    embedded = {name: encoder.images(images) for name, images in crops.items()}
    faces = {name: rows[rows.any(dim=1)] for name, rows in embedded.items()}
    shown = {name: rows for name, rows in faces.items() if len(rows)}
    if not shown:
        raise ValueError(
            f"the metric arcface: {metric.faces!r} finds no face in the references of any concept "
            f"({', '.join(crops)}); leave the metric out, or choose references that show faces"
        )
    return Embedded(encoder, shown)


def check_chosen(suite: Suite) -> None:
    """Raises ValueError if the model of a metric that the user chose is not there, or cannot measure it."""
    for metric in suite.metrics:
        if metric.name == "arcface":
            FaceEncoder(metric.model, metric.faces)
            if metric.faces is None:
                logger.warning(
                    "the metric arcface takes what was found of a subject for its face; where that is more than a "
                    "face, name a network that finds faces: arcface=%s+FACES.onnx",
                    metric.model,
                )
            continue
        try:
            family = family_of(metric.model)
        except ValueError as error:
            raise ValueError(
                f"the metric {metric.name} needs the model {metric.model!r}, and {error}. Download it where there is a "
                f"network (hf download {metric.model}), or name the folder of one: --metrics {metric.name}=FOLDER"
            ) from error
        if metric.name == "clip-t" and family not in IMAGES_AND_TEXTS:
            raise ValueError(
                f"the metric clip-t compares images with their prompts, and {metric.model!r} of the family {family!r} "
                f"reads no text; name one of {', '.join(IMAGES_AND_TEXTS)}"
            )


def _features(
    by: Embedded, image: Image.Image, prompt: str, concepts: Sequence[str], detected: Mapping[str, Image.Image]
) -> Features:
    """What a model says of an image of concepts, in which crops of some were found, as far as it has references."""
    detected = {name: crop for name, crop in detected.items() if name in by.references}
    whole, crops = by.encoder.images([image]), by.encoder.images(list(detected.values()))
    return Features(
        text=_clip_t(by.encoder, whole, prompt),
        whole={name: _rounded(clip_i(whole, by.references[name])[0]) for name in concepts if name in by.references},
        found={
            name: _rounded(clip_i(crop[None], by.references[name])[0])
            for name, crop in zip(detected, crops, strict=True)
        },
    )


def _clip_t(encoder: Encoder | FaceEncoder, whole: Tensor, prompt: str) -> float | None:
    return _rounded(clip_t(whole, encoder.texts([prompt]))[0]) if encoder.has_text else None


def colours_of(image: Image.Image) -> tuple[float, ...]:
    """Mean and standard deviation of red, green and blue over an image, 0 to 1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    return tuple(map(_rounded, [*pixels.mean((0, 1)), *pixels.std((0, 1))]))


def squared(image: Image.Image) -> Image.Image:
    """Pads an image with grey to a square, since encoders would crop or stretch it."""
    side = max(image.size)
    return ImageOps.pad(image, (side, side), color=(128, 128, 128))


def _placed(box: Box, region: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x < region[2] and region[1] <= y < region[3]


def _rounded(value: float) -> float:
    return round(float(value), 5)


def reference_files(concept: SuiteConcept) -> list[Path]:
    """The reference images of a concept; raises ValueError if there are none."""
    references = concept.references
    if not isinstance(references, str):
        return [expanded(source) for source in references]
    model, colon, name = references.partition(":")
    if colon and model in PLAYGROUNDS:
        return playground_references(name)
    folder = expanded(references)
    if not folder.is_dir():
        raise ValueError(f"concept {concept.name!r}: there is no folder {references!r} with reference images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"concept {concept.name!r}: no image in {references!r}; expected {', '.join(IMAGE_SUFFIXES)}")
    return paths


def reference_crops(concept: SuiteConcept) -> list[Image.Image]:
    """The reference images of a concept, cut to it where its folder says where it is. ValueError if one is missing."""
    return [reference_crop(path, f"concept {concept.name!r}") for path in reference_files(concept)]


def reference_crop(path: Path, concept: str = "") -> Image.Image:
    """A reference image, cut to what it is a reference of.

    A file `captions.tsv` in its folder may say where that is, a line for every image: its name, a caption, and left,
    top and side of a square in pixels, parted by tabs. Raises ValueError if it is missing or unreadable.
    """
    image = _opened(path, f"{concept}: the reference image {str(path)!r}".removeprefix(": "))
    box = recorded_box(path)
    return squared(image if box is None else image.crop(box))


def recorded_box(path: Path) -> Box | None:
    """Where in a reference image its concept is, if its folder says that."""
    return _recorded_boxes(path.parent).get(path.name)


def _opened(path: Path, where: str) -> Image.Image:
    try:
        with open_regular(path) as file:
            return on_white(upright_image(file))
    except FileNotFoundError as error:
        raise ValueError(f"{where} is missing") from error
    except Exception as error:  # Pillow raises many kinds of errors for damaged images
        raise ValueError(f"{where} cannot be read: {error}") from error


def _recorded_boxes(folder: Path) -> dict[str, Box]:
    """Boxes by file name."""
    path = folder / CAPTIONS
    if not path.is_file():
        return {}
    boxes = {}
    for line in read_whole(path).decode().splitlines():
        cells = line.split("\t")
        if len(cells) == 3 and len(edges := cells[2].split()) == 3:
            left, top, side = map(int, edges)
            boxes[cells[0]] = (left, top, left + side, top + side)
    return boxes
