"""The images of an evaluation with what was measured on them, ready for an HTML page."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from lora_compose.compose.evaluation.table import Evaluation

MANY, SIDE, SMALL_SIDE = 400, 384, 192
"""From how many images on they are embedded smaller, and the longer side of few and of many, in pixels."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images with what was measured on them, ready for the page."""

    out: Path
    evaluation: Evaluation

    @property
    def many(self) -> bool:
        """Whether there are so many images that they are embedded smaller."""
        return len(self.evaluation.images) > MANY

    @property
    def side(self) -> int:
        """Longest side of an embedded image."""
        return SMALL_SIDE if self.many else SIDE

    @cached_property
    def _concepts(self) -> dict[str, list[dict[str, Any]]]:
        table = self.evaluation.concepts.astype(object)
        table = table.where(table.notna(), None).assign(alone=self.evaluation.concepts["alone"].fillna(""))
        keys = ["scene", "arm", "alone", "seed"]
        return {str(key): rows.to_dict("records") for key, rows in table.groupby(keys, sort=False)}

    @cached_property
    def _images(self) -> dict[str, dict[str, Any]]:
        rows = self.evaluation.images.assign(alone=self.evaluation.images["alone"].fillna("")).to_dict("records")
        return {str((row["scene"], row["arm"], row["alone"], row["seed"])): row for row in rows}

    def shown(self, scene: str, arm: str, alone: str | None, seed: int) -> dict[str, Any] | None:
        """An image with its scores; None if it has none."""
        key = str((scene, arm, alone or "", seed))
        if key not in self._images:
            return None
        row = self._images[key]
        source, size = self._embedded(row["file"])
        places = self.evaluation.suite.scene(scene).concepts
        concepts = [{**c, "box": _percent(c, size), "place": places.index(c["concept"])} for c in self._concepts[key]]
        return {**row, "source": source, "size": size, "concepts": concepts}

    def _embedded(self, file: str) -> tuple[str, tuple[int, int]]:
        """An image as a data URI, and its own size; an empty one if it cannot be read."""
        try:
            with Image.open(path := self.out / file) as image:
                if max(image.size) <= self.side and not self.many:
                    return as_uri(path.read_bytes(), "png"), image.size
                return shrunk(image, self.side), image.size
        except (OSError, SyntaxError, Image.DecompressionBombError):
            return "", (1, 1)


def shrunk(image: Image.Image, side: int) -> str:
    """A smaller copy as a data URI; its longer side is at most `side` pixels."""
    copy = image.convert("RGB")
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    copy.save(stream, "WEBP", quality=85)
    return as_uri(stream.getvalue(), "webp")


def as_uri(data: bytes, kind: str) -> str:
    """An image file as a data URI; `kind` is the second half of its media type."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _percent(concept: Mapping[str, Any], size: tuple[int, int]) -> dict[str, float] | None:
    """The place and size of a concept's box, in percent of the image."""
    if concept["left"] is None:
        return None
    left, top, right, bottom = (concept[edge] for edge in ("left", "top", "right", "bottom"))
    across, down = 100 / size[0], 100 / size[1]
    places = {
        "left": left * across,
        "top": top * down,
        "width": (right - left) * across,
        "height": (bottom - top) * down,
    }
    return {name: round(place, 2) for name, place in places.items()}
