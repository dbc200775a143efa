"""Where attention to a class word lies in each block and step, beside where the judge finds the object.

    PYTHONPATH=assets python -m recipe.drafts MODEL FLUX --judge JUDGE

Plain prompts with two or three objects, without LoRAs. `draft` decides by such maps where each LoRA acts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from lora_compose.attention import backbone_of, grid_at
from lora_compose.attention.masks import smooth
from lora_compose.compose.evaluation.detectors import Detection, WindowDetector
from lora_compose.compose.evaluation.encoders import JUDGE, load_encoder
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.denoising.passes import MapRequest
from lora_compose.pipelines.denoising.process import Process, Settings
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.methods.draft import Draft, Drafting
from lora_compose.pipelines.methods.drafted import on_all_rows
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.division import THRESHOLD, centres_of, nearest, spacing
from lora_compose.pipelines.scene.scene import Concept
from recipe.plain import make
from recipe.scenes import enumerate_words
from recipe.world import CLASSES, article

SCENES = (
    (("cat", "dog"), "on a white background"),
    (("rabbit", "bear"), "on grass"),
    (("robot", "owl"), "on a gray background"),
    (("woman", "man"), "in a room"),
    (("dog", "woman"), "in snow"),
    (("man", "robot"), "on sand"),
    (("owl", "cat"), "on a blue background"),
    (("cat", "rabbit", "robot"), "on grass"),
    (("dog", "man", "owl"), "on a white background"),
    (("bear", "woman", "dog"), "in snow"),
)
"""Classes from left to right, and where they are."""
STEPS = (0, 1, 2, 3, 4, 5, 8, 12)
DEFAULT = "draft"
"""The row of the layers that `draft` takes."""
THIRDS = ("first third", "middle third", "last third")
SPACES = (0.4, 0.5, 0.6, 0.7, 0.8)


class Where(NamedTuple):
    """A map: its layer, or the name of a mean over several, and the step."""

    layer: str
    step: int


@dataclass(frozen=True)
class Watching(Settings):
    """Makes a plain image, and keeps maps of many layers and steps.

    Attributes:
        found: Receives the maps. Shape: [images, subjects, height, width] each.
    """

    steps: Sequence[int]
    found: dict[Where, Tensor] = field(default_factory=dict)

    def start(self, session: Session) -> Process:
        """The draft of `draft`, to its end."""
        drafting = Draft(reading="scene").start(session)
        assert isinstance(drafting, Drafting), "there are several subjects"
        return _Watched(self, drafting)


@dataclass(frozen=True)
class _Watched:
    settings: Watching
    drafting: Drafting

    @property
    def text(self) -> Any:
        return self.drafting.draft.spec.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        session, draft, request = self.drafting.session, self.drafting.draft, None
        canvas = session.canvas
        if step.index in self.settings.steps:
            words = MapRequest(self.drafting.words, layers=canvas.backbone.word_layers)
            request = on_all_rows(words, draft, step)
        prediction = session.denoiser.predict(latents, step, draft, request)
        if prediction.maps is not None:
            grid = grid_at(canvas.latent_grid, canvas.map_level)
            for layer in canvas.backbone.word_layers:
                cells = prediction.maps.by_layer[layer][prediction.rows.conditional]
                self.settings.found[Where(layer, step.index)] = cells.transpose(1, 2).unflatten(2, grid)
        return latents, session.guider.combine(prediction, step)


def with_means(found: Mapping[Where, Tensor], drafted: Sequence[str]) -> Mapping[Where, Tensor]:
    """The maps, and means: over the layers of `draft`, a kind of blocks or a third of all, in a step or up to it."""
    layers, steps = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    kinds = {layer.partition(".")[0]: None for layer in layers}
    groups = {DEFAULT: drafted} | {
        f"all {kind}": [layer for layer in layers if layer.startswith(f"{kind}.")] for kind in kinds
    }
    ends = [round(n * len(layers) / len(THIRDS)) for n in range(len(THIRDS) + 1)]
    groups |= {name: layers[start:end] for name, start, end in zip(THIRDS, ends, ends[1:], strict=False) if start < end}
    means = {
        Where(name, step): torch.stack([found[Where(layer, step)] for layer in of]).mean(dim=0)
        for name, of in groups.items()
        for step in steps
    }
    so_far = {
        Where(f"{name}, steps so far", steps[n]): torch.stack(
            [means[Where(name, step)] for step in steps[: n + 1]]
        ).mean(dim=0)
        for name in groups
        for n in range(len(steps))
    }
    return {**means, **so_far, **found}


class Fit(NamedTuple):
    """How a map fits an object that the judge sees.

    Attributes:
        centre: Whether the centre of the map lies in the object.
        region: The share of the object that lies in the region of its subject.
    """

    centre: bool
    region: float


def fits(maps: Tensor, classes: Sequence[str], seen: Sequence[Detection], size: tuple[int, int]) -> Iterator[Fit]:
    """How the maps of an image fit each of its objects that the judge sees.

    Args:
        maps: Shape: [subjects, height, width].
        classes: The class of each.
        seen: Most confident first.
        size: Width and height in pixels.
    """
    centres = centres_of(smooth(maps), classes, THRESHOLD)
    owned = nearest(centres, torch.ones(size[1], size[0]))
    for name, (down, across), region in zip(classes, centres.tolist(), owned, strict=True):
        box = next((one.box for one in seen if one.word == name), None)
        if box is None:
            continue
        left, top, right, bottom = box
        inside = left <= across * size[0] < right and top <= down * size[1] < bottom
        yield Fit(inside, float(region[top:bottom, left:right].mean()))


def table(title: str, values: Mapping[Where, Sequence[float]]) -> Iterator[str]:
    """Lines with the mean by layer and step."""
    layers, steps = (list(dict.fromkeys(part)) for part in zip(*values, strict=True))
    width = max(map(len, layers))
    yield f"{title}, by step"
    yield f"{'':{width}}" + "".join(f"{step + 1:>7}" for step in sorted(steps))
    for layer in layers:
        each = (values[Where(layer, step)] for step in sorted(steps))
        yield f"{layer:{width}}" + "".join(f"{sum(one) / max(1, len(one)):7.2f}" for one in each)


@handle_errors()
def main(
    models: Annotated[list[Path], typer.Argument(help="Folders as diffusers saves them.")],
    judge: Annotated[str, typer.Option(help="The playground's, or a folder.")] = JUDGE,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 4,
    scenes: Annotated[int, typer.Option(min=1, help="At most so many.")] = len(SCENES),
    objects: Annotated[int | None, typer.Option(min=2, max=3, help="Only scenes with so many objects.")] = None,
) -> None:
    """Prints for each block and step how often the map's centre is in the object, and how much of it in its region."""
    detector = WindowDetector(load_encoder(judge), CLASSES)
    wanted = [scene for scene in SCENES if objects in (None, len(scene[0]))][:scenes]
    for model in models:
        pipe: Any = ComposePipeline.from_pretrained(model, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        backbone = backbone_of(pipe.model)
        centres: dict[Where, list[float]] = {}
        regions: dict[Where, list[float]] = {}
        spaces: list[tuple[float, bool]] = []
        with bar(f"making images with {model.name}", len(wanted)) as on_progress:
            for n, (classes, place) in enumerate(wanted, 1):
                subjects = [Concept(name=name, role="bystander", class_word=name) for name in classes]
                watching = Watching(STEPS)
                prompt = f"{enumerate_words([article(name) for name in classes])} {place}"
                images = make(pipe, prompt, range(seeds), concepts=subjects, method=watching)
                found = with_means(watching.found, backbone.map_layers)
                for i, image in enumerate(images):
                    seen = detector.detect(image, classes)
                    for where, maps in found.items():
                        each = list(fits(maps[i], classes, seen, image.size))
                        centres.setdefault(where, []).extend(fit.centre for fit in each)
                        regions.setdefault(where, []).extend(fit.region for fit in each)
                    drafted = found[Where(DEFAULT, 3)][i]
                    none = [torch.zeros(drafted.shape[1:], dtype=torch.bool)] * len(classes)
                    whole = {one.word for one in seen} == set(classes)
                    spaces.append((spacing(drafted, subjects, none, THRESHOLD), whole))
                on_progress(n)
        objects_seen, every = len(next(iter(centres.values()))), sum(whole for _, whole in spaces)
        echo(
            f"\n{model}: the judge sees {objects_seen} objects, and all of a prompt in {every} of {len(spaces)} images"
        )
        for line in table("centre of the map in the object", centres):
            echo(line)
        for line in table("share of the object in the region of its subject", regions):
            echo(line)
        for least in SPACES:
            parts = [[whole for far, whole in spaces if (far >= least) == enough] for enough in (True, False)]
            shares = [f"{sum(part)} of {len(part)}" for part in parts]
            echo(f"all objects seen, spacing at least {least}: {shares[0]}; less: {shares[1]}")


if __name__ == "__main__":
    typer.run(main)
