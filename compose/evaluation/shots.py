"""Images as they are stored, with their scores as matrices."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lora_compose.compose.evaluation import results
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import read

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")


@dataclass(frozen=True, eq=False)
class Shot:
    """An image with scores.

    `concepts` are the subjects of its scene, `acting` the places of those that count, `styles` the styles that count
    and how much of each the image has. `truth` is that of `results.Scores`.
    """

    planned: results.Planned
    seed: int
    file: str
    made: results.Made
    scores: results.ImageScores
    truth: Mapping[str, Mapping[str, float]]
    concepts: tuple[str, ...]
    styles: Mapping[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that identify the image in tables."""
        return {"scene": self.planned.scene, "arm": self.planned.arm, "alone": self.planned.alone, "seed": self.seed}

    @property
    def acting(self) -> list[int]:
        """The places of the subjects that count."""
        return [i for i, name in enumerate(self.concepts) if self.planned.alone in (None, name)]

    @property
    def names(self) -> list[str]:
        """The subjects that count."""
        return [self.concepts[i] for i in self.acting]

    @property
    def similarity(self) -> np.ndarray:
        """S [concepts, concepts] of the metrics, with rows of NaN for those that do not count."""
        values = _matrix({name: self.scores.concepts[name].similarity for name in self.concepts}, self.concepts)
        values[[i for i in range(len(values)) if i not in self.acting]] = np.nan
        return values

    @property
    def slots(self) -> np.ndarray:
        """The matrix of `confusion`, of the subjects that count. Shape: [acting, acting]."""
        # Alone nothing can be swapped, and by place what was found may be another's, whose LoRA does not act.
        crop = "slot" if self.planned.alone is None else "similarity"
        return _matrix({name: getattr(self.scores.concepts[name], crop) for name in self.names}, self.names)

    @property
    def true(self) -> np.ndarray | None:
        """The similarity matrix of the references; None for images that an older version scored."""
        return _matrix(self.truth, self.names) if self.truth else None

    def found_by(self, metric: str) -> np.ndarray:
        """Similarity of each subject that counts by a chosen metric's model; NaN if not found. Shape: [acting]."""
        similarity = self.scores.chosen[metric].found
        return np.array([similarity.get(name, np.nan) for name in self.names], dtype=np.float64)

    def whole_by(self, metric: str) -> np.ndarray:
        """Similarity of the whole image to each subject by that model; NaN without references. Shape: [acting]."""
        similarity = self.scores.chosen[metric].whole
        return np.array([similarity.get(name, np.nan) for name in self.names], dtype=np.float64)


def _matrix(rows: Mapping[str, Mapping[str, float]], names: tuple[str, ...] | list[str]) -> np.ndarray:
    values = [[rows[name].get(other, np.nan) for other in names] for name in names]
    return np.array(values, dtype=np.float64).reshape(len(names), len(names))


def stored_shots(out: Path, plan: results.BatchPlan) -> tuple[list[Shot], list[results.Failed], int, int]:
    """Images with scores, failures, how many batches are not made, and how many images are not scored."""
    shots: list[Shot] = []
    failed: list[results.Failed] = []
    missing = unscored = 0
    for planned in plan.batches:
        concepts = plan.suite.scene(planned.scene).concepts
        made = _sound(results.read_made, out, planned)
        scores = _sound(results.read_scores, out, planned, concepts)
        failure = _sound(read, results.batch_folder(out, planned.key) / results.FAILED, results.Failed)
        if made is not None and scores is not None:
            subjects = tuple(name for name in concepts if not plan.suite.concept(name).is_style)
            for seed in planned.seeds:
                file = results.image_path(out, planned.key, seed).relative_to(out).as_posix()
                shots.append(Shot(planned, seed, file, made, scores.images[seed], scores.truth, subjects))
        elif failure is not None:
            failed.append(failure)
        elif made is None:
            missing += 1
        else:
            unscored += len(planned.seeds)
    return shots, failed, missing, unscored


def _sound(reader: Callable[..., _Read | None], *args: Any) -> _Read | None:
    """Reads results; a damaged batch is logged and left out, so that the others are still shown."""
    try:
        return reader(*args)
    except FileError as error:
        logger.error("%s, and is left out; run the evaluation again to repair it", error)
        return None
