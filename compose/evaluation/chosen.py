"""Metrics that a user chooses by name, each with a model of its own."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from lora_compose.compose.support.frozen import Frozen

ChosenName = Literal["clip-t", "clip-i", "dino", "scr", "arcface"]
MODELS: dict[str, str] = {
    "clip-t": "openai/clip-vit-base-patch32",
    "clip-i": "openai/clip-vit-base-patch32",
    "dino": "facebook/dinov2-base",
    "scr": "facebook/dinov2-base",
}
"""The model of each metric unless another is named; arcface has none."""
COLLAPSED = 0.4
"""The similarity below which a subject has collapsed, by DINOv2: the lowest threshold of arXiv 2603.26078."""


_ONNX = ".onnx"
_BOTH = f"{_ONNX}+"
_NEEDS = (
    "arcface needs a network of yours that recognises faces: write arcface=FILE.onnx, or with one that finds them "
    "arcface=FILE.onnx+FACES.onnx"
)


class Chosen(Frozen):
    """A metric that a user chose.

    Attributes:
        name: Its name: clip-t, clip-i, dino, scr or arcface.
        model: A folder or hub repository of CLIP, SigLIP or DINOv2, or `playground:judge`; by default that of `MODELS`.
            Of arcface, the file of an ONNX network that recognises faces.
        faces: Of arcface, the file of an ONNX network that finds faces, as YuNet does; None takes what was found of a
            subject for its face.
        threshold: Of scr, the similarity below which a subject has collapsed; other models than DINOv2 need another.
    """

    name: ChosenName
    model: Annotated[str, Field(min_length=1)]
    faces: Annotated[str, Field(min_length=1)] | None = None
    threshold: Annotated[float, Field(gt=-1, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """`dino` is `{name: dino}` with its usual model, and `dino=FOLDER` is `{name: dino, model: FOLDER}`.

        `arcface=FILE.onnx+FACES.onnx` names both networks.
        """
        if isinstance(data, str):
            name, named, model = data.partition("=")
            data = {"name": name.strip(), **({"model": model.strip()} if named else {})}
            if data["name"] == "arcface" and _BOTH in data.get("model", ""):
                model, _, faces = data["model"].partition(_BOTH)
                data |= {"model": f"{model}{_ONNX}", "faces": faces}
        if isinstance(data, dict) and data.get("name") == "arcface" and "model" not in data:
            raise ValueError(_NEEDS)
        if isinstance(data, dict) and data.get("name") in MODELS:
            data = {"model": MODELS[data["name"]], **data}
        return data

    @model_validator(mode="after")
    def _reads_what_is_given(self) -> Self:
        if self.threshold is not None and self.name != "scr":
            raise ValueError(f"{self.name} reads no threshold, only scr does")
        if self.faces is not None and self.name != "arcface":
            raise ValueError(f"{self.name} finds no faces, only arcface does")
        return self


def chosen(names: Iterable[str]) -> tuple[Chosen, ...]:
    """Metrics from the command line, each with "=" and a model if it is not the usual one. ValueError for others."""
    metrics = []
    for text in names:
        name, known = text.partition("=")[0].strip(), get_args(ChosenName)
        if name not in known:
            raise ValueError(f"there is no metric {name!r}; choose from {', '.join(known)}")
        if name == "arcface" and not text.partition("=")[2].strip():
            raise ValueError(_NEEDS)
        if text.rstrip().endswith("="):
            raise ValueError(f"{text!r} names no model: write {name}=FOLDER, or only {name}")
        metrics.append(Chosen.model_validate(text))
    return distinct(tuple(metrics))


def distinct(metrics: tuple[Chosen, ...]) -> tuple[Chosen, ...]:
    """Raises ValueError if a metric is named twice."""
    names = [metric.name for metric in metrics]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the metric {twice[0]!r} stands twice")
    return metrics
