"""Small networks as ONNX files, written by hand: protocol buffers of onnx.proto, of opset 13."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 112
CHANNELS = 8
MARK = (255, 0, 0)
"""The colour of the mark by which `write_finder`'s network finds a face."""
REACH = 64
"""Width and height of its faces, in images of 320 pixels."""
POINTS = ((-1.6, -1.0), (2.2, -1.3), (0.4, 0.9), (-1.1, 2.6), (2.0, 2.2))
"""Eyes, nose and corners of the mouth, from the corner of the mark's cell in cells of 8 pixels."""


def _number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _tensor(name: str, values: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[values.dtype.name]
    return b"".join(_field(1, side) for side in values.shape) + _field(2, kind) + _field(8, name) + _field(
        9, values.tobytes()
    )  # fmt: skip


def _attribute(name: str, values: Sequence[int]) -> bytes:
    return _field(1, name) + b"".join(_field(8, value) for value in values) + _field(20, 7)


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Sequence[int]) -> bytes:
    """A node of a graph, named after its output."""
    named = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(3, output)
    return named + _field(4, operator) + b"".join(_field(5, _attribute(*it)) for it in attributes.items())


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    sides = b"".join(_field(1, _field(1 if isinstance(side, int) else 2, side)) for side in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sides)))


def write(
    path: Path,
    nodes: Sequence[bytes],
    constants: Mapping[str, Any],
    image: Sequence[int | str],
    outputs: Mapping[str, Sequence[int | str]],
) -> Path:
    """Writes a network that reads `input`, and returns its path."""
    graph = b"".join(_field(1, it) for it in nodes) + _field(2, "graph")
    graph += b"".join(_field(5, _tensor(name, np.asarray(values))) for name, values in constants.items())
    graph += _field(11, _value("input", image)) + b"".join(_field(12, _value(*it)) for it in outputs.items())
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path


def weights() -> dict[str, np.ndarray]:
    """The weights of `write_recogniser`."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3, 5, 5), "bias": (4,), "matrix": (4 * 7 * 7, CHANNELS)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_recogniser(path: Path, *, scales: bool = False) -> Path:
    """A convolution, means of 16 x 16 pixels and a matrix; it scales pixels to -1 to 1 itself, or not."""
    constants: dict[str, Any] = {**weights(), "flat": np.array([1, -1])}
    nodes, read = [], "input"
    if scales:
        constants |= {"mean": np.array([127.5], np.float32), "factor": np.array([1 / 127.5], np.float32)}
        nodes, read = (
            [node("Sub", ["input", "mean"], "shifted"), node("Mul", ["shifted", "factor"], "scaled")],
            "scaled",
        )
    nodes += [
        node("Conv", [read, "kernel", "bias"], "features", kernel_shape=[5, 5], pads=[2, 2, 2, 2], strides=[1, 1]),
        node("Relu", ["features"], "positive"),
        node("AveragePool", ["positive"], "means", kernel_shape=[16, 16], strides=[16, 16]),
        node("Reshape", ["means", "flat"], "row"),
        node("MatMul", ["row", "matrix"], "embedding"),
    ]
    return write(path, nodes, constants, [1, 3, SIDE, SIDE], {"embedding": [1, CHANNELS]})


def write_finder(path: Path) -> Path:
    """Finds a face at each mark, with the outputs of YuNet: the mark is one cell of 8 pixels, the face is around it."""
    constants: dict[str, Any] = {}
    nodes: list[bytes] = []
    for stride in (8, 16, 32):
        pooled = f"pooled{stride}"
        nodes.append(node("AveragePool", ["input"], pooled, kernel_shape=[stride] * 2, strides=[stride] * 2))
        red = np.array([[0, -1 / 255, 1 / 255]], np.float32) * (stride == 8)  # OpenCV gives blue, green, red
        box = np.array([0.5, 0.5, np.log(REACH / stride), np.log(REACH / stride)], np.float32)
        points = np.array(POINTS, np.float32).reshape(-1)
        heads = {
            "cls": (red, np.zeros(1, np.float32)), "obj": (red, np.zeros(1, np.float32)),
            "bbox": (np.zeros((4, 3), np.float32), box), "kps": (np.zeros((10, 3), np.float32), points),
        }  # fmt: skip
        for name, (kernel, bias) in heads.items():
            key = f"{name}_{stride}"
            constants |= {f"{key}.w": kernel[:, :, None, None], f"{key}.b": bias, f"{key}.to": [1, -1, len(bias)]}
            inputs = [pooled, f"{key}.w", f"{key}.b"]
            nodes += [
                node("Conv", inputs, f"{key}.map", kernel_shape=[1, 1], strides=[1, 1]),
                node("Transpose", [f"{key}.map"], f"{key}.last", perm=[0, 2, 3, 1]),
                node("Reshape", [f"{key}.last", f"{key}.to"], key),
            ]
    outputs = {
        f"{name}_{stride}": [1, f"n{stride}", width]
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
        for stride in (8, 16, 32)
    }
    return write(path, nodes, constants, [1, 3, "h", "w"], outputs)
