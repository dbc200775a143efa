"""From a picture to its raw scores: find the concepts, cut them out, compare them with their references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from attention.masks import Box
from compose.assets import playground_references
from compose.evaluation.detectors import Detection, Detector
from compose.evaluation.encoders import Encoder
from compose.evaluation.metrics import assign, clip_i, clip_t, similarity_matrix
from compose.evaluation.results import ConceptScore, PictureScores
from compose.evaluation.suite import Suite, SuiteConcept, SuiteScene, without_triggers
from compose.files import PLAYGROUND

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PIXEL_LIMIT = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores pictures of a suite.

    Attributes:
        suite: What is evaluated.
        encoder: Measures similarity.
        detector: Finds concepts; None takes the regions of the scenes.
        references: Embedded reference pictures by concept. Shape: [pictures, channels] each.
    """

    suite: Suite
    encoder: Encoder
    detector: Detector | None
    references: Mapping[str, Tensor]

    def score(self, image: Image.Image, scene: SuiteScene) -> PictureScores:
        """What can be measured on a picture of a scene."""
        concepts = [self.suite.concept(name) for name in scene.concepts]
        references = [self.references[name] for name in scene.concepts]
        whole = self.encoder.images([image])
        told = None
        if self.encoder.has_text:
            told = float(clip_t(whole, self.encoder.texts([without_triggers(scene.prompt, concepts)]))[0])
        found = self._found(image, scene, concepts)
        boxes = [one.box for one in found]
        crops = self.encoder.images([squared(image.crop(box)) for box in boxes]) if boxes else whole[:0]
        similarity = similarity_matrix(crops, references)  # [findings, concepts]
        chosen = _chosen(similarity, found, scene, concepts)
        scores = {}
        for j, (concept, i) in enumerate(zip(concepts, chosen, strict=True)):
            whole_similarity = float(clip_i(whole, references[j])[0])
            scores[concept.name] = ConceptScore(whole=_rounded(whole_similarity))
            if i is not None:
                scores[concept.name] = ConceptScore(
                    box=boxes[i],
                    detection=found[i].score if self.detector else None,
                    similarity=dict(zip(scene.concepts, map(_rounded, similarity[i].tolist()), strict=True)),
                    whole=_rounded(whole_similarity),
                    placed=_placed(boxes[i], scene.regions.get(concept.name)) if self.detector else None,
                )
        extra = len(found) - sum(i is not None for i in chosen) if self.detector else None
        return PictureScores(clip_t=None if told is None else _rounded(told), concepts=scores, extra=extra)

    def _found(self, image: Image.Image, scene: SuiteScene, concepts: Sequence[SuiteConcept]) -> list[Detection]:
        if self.detector is not None:
            return self.detector.detect(image, [concept.class_word for concept in concepts])
        # A region belongs to its concept, whatever their class words.
        return [Detection(concept.name, scene.regions[concept.name], 1.0) for concept in concepts]


def squared(image: Image.Image) -> Image.Image:
    """A picture as it is, with grey beside it up to a square: encoders would cut off or bend what is not square."""
    side = max(image.size)
    return ImageOps.pad(image, (side, side), color=(128, 128, 128))


def _chosen(
    similarity: np.ndarray, found: Sequence[Detection], scene: SuiteScene, concepts: Sequence[SuiteConcept]
) -> list[int | None]:
    """Which finding belongs to which concept: one each, of its own class, by similarity to its references."""
    allowed = np.array(
        [[one.word in (concept.class_word, concept.name) for one in found] for concept in concepts], dtype=bool
    ).reshape(len(concepts), len(found))
    return assign(similarity.T, allowed)


def _placed(box: Box, region: Box | None) -> bool | None:
    if region is None:
        return None
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x < region[2] and region[1] <= y < region[3]


def _rounded(value: float) -> float:
    return round(value, 5)


def reference_files(concept: SuiteConcept) -> list[Path]:
    """The reference pictures of a concept.

    Raises:
        ValueError: If there are none.
    """
    given = concept.references
    if isinstance(given, str) and given.startswith(f"{PLAYGROUND}:"):
        return playground_references(given.removeprefix(f"{PLAYGROUND}:"))
    if not isinstance(given, str):
        return [Path(source).expanduser() for source in given]
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(f"concept {concept.name!r}: there is no folder {given!r} with reference pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"concept {concept.name!r}: no picture in {given!r}; expected {', '.join(PICTURE_SUFFIXES)}")
    return found


def reference_crops(concept: SuiteConcept) -> list[Image.Image]:
    """The reference pictures of a concept, each cut to the concept where its folder says where that is.

    Raises:
        ValueError: If one is missing or unreadable.
    """
    return [reference_crop(path, f"concept {concept.name!r}") for path in reference_files(concept)]


def reference_crop(path: Path, whose: str = "") -> Image.Image:
    """A reference picture, cut to what it is a reference of.

    A file `captions.tsv` in its folder may say where that is, a line for every picture: its name, a caption, and
    left, top and side of a square in pixels, parted by tabs.

    Raises:
        ValueError: If it is missing or unreadable.
    """
    image = _opened(path, f"{whose}: the reference picture {str(path)!r}".removeprefix(": "))
    box = _recorded_boxes(path.parent).get(path.name)
    return squared(image if box is None else image.crop(box))


def _opened(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.width * image.height > _PIXEL_LIMIT:
                raise ValueError(f"{where} has {image.width} x {image.height} pixels, which is too large")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{where} is missing") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _recorded_boxes(folder: Path) -> dict[str, Box]:
    """Boxes by file name."""
    path = folder / "captions.tsv"
    if not path.is_file():
        return {}
    boxes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if len(cells) == 3 and len(edges := cells[2].split()) == 3:
            left, top, side = map(int, edges)
            boxes[cells[0]] = (left, top, left + side, top + side)
    return boxes
