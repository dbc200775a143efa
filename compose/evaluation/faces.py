"""Embeddings of faces by ONNX networks that the user has, run by OpenCV: for the identity of people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lora_compose.pipelines.support.home import expanded

SIDE = 112
"""Width and height of a face as recognition networks read it, in pixels."""
POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where eyes, nose and corners of the mouth are in it, those at the left of the image first: as ArcFace was trained."""
_FOUND_AT = 320  # the longer side of the image in which faces are looked for; YuNet was trained on that
_LEAST = 0.7  # confidence of a face
_ARITHMETIC = ("Eltwise", "NaryEltwise", "Power", "Scale")


class FaceEncoder:
    """Embeds the largest face of an image; `network` and `finder` are files of ONNX networks.

    `network` recognises faces: ArcFace, SFace, or another that reads RGB of 112 x 112 pixels, from -1 to 1, or from 0
    to 255 if it begins with a sum or a product. `finder` finds faces and their five points, as YuNet does: a face is
    turned and scaled so that they are where ArcFace has them. Without one, an image as a whole is taken for the face.
    Deng et al. 2018, "ArcFace", https://arxiv.org/abs/1801.07698.

    Raises:
        ValueError: If a file is missing, or no such network.
    """

    def __init__(self, network: str, finder: str | None = None) -> None:
        path = _file(network, "recognises faces")
        try:
            self._network = cv2.dnn.readNetFromONNX(str(path))
            self._scales = _scales(self._network)
            channels = self._embedded(np.zeros((SIDE, SIDE, 3), np.uint8)).shape
        except cv2.error as error:
            raise ValueError(
                f"{network!r} cannot be run on a face of {SIDE} x {SIDE} pixels: {_short(error)}"
            ) from error
        if len(channels) != 1:
            raise ValueError(f"{network!r} gives {list(channels)} for a face; expected one row of channels")
        self._channels = channels[0]
        self._finder = None if finder is None else _finder(_file(finder, "finds faces"), finder)

    @property
    def has_text(self) -> bool:
        """Faces have no texts."""
        return False

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings of length 1, float32; of an image without a face 0. Shape: [n, channels]."""
        faces = [self.face(image) for image in images]
        embedded = [np.zeros(self._channels, np.float32) if it is None else self._embedded(it) for it in faces]
        rows = np.stack(embedded) if embedded else np.zeros((0, self._channels), np.float32)
        return F.normalize(torch.from_numpy(rows), dim=-1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Always raises ValueError: faces have no texts."""
        raise ValueError("a network for faces reads no text")

    def face(self, image: Image.Image) -> np.ndarray | None:
        """The largest face of an image as a network reads it, None if there is none. Shape: [112, 112, 3], BGR."""
        pixels = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR)
        if self._finder is None:
            return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        factor = _FOUND_AT / max(image.size)
        width, height = (max(1, round(factor * side)) for side in image.size)
        self._finder.setInputSize((width, height))
        faces = self._finder.detect(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))[1]
        if faces is None:
            return None
        largest = faces[np.argmax(faces[:, 2] * faces[:, 3])]
        points = largest[4:14].reshape(5, 2) / (width / image.width, height / image.height)
        return cv2.warpAffine(pixels, _onto_template(points), (SIDE, SIDE))

    def _embedded(self, face: np.ndarray) -> np.ndarray:
        scale, mean = (1.0, 0.0) if self._scales else (1 / 127.5, 127.5)
        self._network.setInput(cv2.dnn.blobFromImage(face, scale, (SIDE, SIDE), (mean,) * 3, swapRB=True))
        (embedding,) = self._network.forward()
        return embedding


def _onto_template(points: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that bring five points nearest to `POINTS`. Shapes: [5, 2] to [2, 3]."""
    x, y = points.T
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, ones, zeros], axis=1), np.stack([y, x, zeros, ones], axis=1)])
    a, b, right, down = np.linalg.lstsq(rows, np.array(POINTS).T.reshape(-1), rcond=None)[0]
    return np.array([[a, -b, right], [b, a, down]])


def _scales(network: Any) -> bool:
    """Whether a network begins with arithmetic, so that it reads pixels as they are."""
    kinds = [network.getLayer(network.getLayerId(name)).type for name in network.getLayerNames()]
    before = next((i for i, kind in enumerate(kinds) if kind.startswith("Conv")), 0)
    return any(kind in _ARITHMETIC for kind in kinds[:before])


def _finder(path: Path, source: str) -> Any:
    try:
        finder = cv2.FaceDetectorYN.create(str(path), "", (_FOUND_AT, _FOUND_AT), _LEAST)
        finder.detect(np.zeros((_FOUND_AT, _FOUND_AT, 3), np.uint8))
    except cv2.error as error:
        raise ValueError(f"{source!r} finds no faces as YuNet does: {_short(error)}") from error
    return finder


def _file(source: str, what: str) -> Path:
    path = expanded(source)
    if not path.is_file() or path.suffix.lower() != ".onnx":
        raise ValueError(f"there is no file {source!r} of a network that {what}; expected a file .onnx")
    return path


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
