"""The demo: pairs of the playground's concepts, each alone and composed by several methods, and three in boxes."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND, assets_dir, ordinary
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.scene.sources import moved_files

PAIRS = ("cat-dog", "mira-omar", "bear-robot")
THREE = "three"
SEEDS = (0, 1)  # the first two, not picked by what they show
STEPS, GUIDANCE = 25, 5.0
THREADS = 1  # a model this small gains little from more, and loses a lot where other programs are busy

_PAIRS_TITLE = "Two concepts, each trained alone"
BOXES = ((0.0, 1 / 8, 15 / 32, 7 / 8), (17 / 32, 1 / 8, 1.0, 7 / 8))  # left and right, as fractions of the image
COMPOSED = ("merge", "regional", "lora-composer")
COLUMNS = {
    "first": ("concept 1 alone", "its ordinary LoRA"),
    "second": ("concept 2 alone", "its ordinary LoRA"),
    "merge": ("merge", "ordinary LoRAs, summed"),
    "draft": ("draft", "ordinary LoRAs, no boxes"),
    "clora": ("clora", "ordinary LoRAs, no boxes"),
    "regional": ("regional", "ordinary LoRAs, a box each"),
    "lora-composer": ("lora-composer", "ordinary LoRAs, a box each"),
}


@dataclass(frozen=True)
class Job:
    """One image of the demo: a scene's name, a column's name, and the run that makes it."""

    scene: str
    part: str
    run: Run

    @property
    def file_name(self) -> str:
        """The image's file in the demo's folder."""
        return f"{self.scene}-{self.part}-{self.run.seed}.png"


def jobs(seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> list[Job]:
    """All images: first those of one pair and seed, then all others, so that those with the same LoRAs follow."""
    scenes = {name: read_scene(assets_dir() / "scenes" / f"{name}.yaml") for name in (*PAIRS, THREE)}
    parts = [(name, *part) for name in PAIRS for part in _pair(scenes[name])]
    boxed = scenes[THREE]
    unboxed = tuple(concept.model_copy(update={"region": None}) for concept in boxed.concepts)
    merged = boxed.model_copy(update={"concepts": unboxed})
    parts += [(THREE, method, merged if method == "merge" else boxed, method) for method in COMPOSED]
    every = [
        Job(name, part, Run(scene=scene, model=PLAYGROUND, method=method, steps=steps, guidance_scale=GUIDANCE,
            seed=seed, device="cpu"))
        for name, part, scene, method in parts
        for seed in seeds
    ]  # fmt: skip
    return sorted(every, key=lambda job: (job.scene, job.run.seed) != (PAIRS[0], seeds[0]))


def show(folder: Path, todo: Sequence[Job], on_progress: Callable[[float], None]) -> Iterator[Path]:
    """Makes the images and yields sheets once their images are there; `on_progress` gets the images done so far.

    The sheets: the first pair with the first seed, all pairs, and three concepts.
    """
    first = todo[0].scene, todo[0].run.seed
    sheets = {
        "first.png": (_PAIRS_TITLE, [job for job in todo if (job.scene, job.run.seed) == first]),
        "sheet.png": (_PAIRS_TITLE, [job for job in todo if job.scene != THREE]),
        "three.png": ("Three concepts, a box for each", [job for job in todo if job.scene == THREE]),
    }
    pipe = open_model(todo[0].run)
    images = {}
    with threads(THREADS):
        for i, job in enumerate(todo):
            made = make(pipe, job.run, lambda share, done=i: on_progress(done + share))
            save_image(made.image, folder / job.file_name, made.record)
            images[job.file_name] = made.image
            for name, (title, needed) in sheets.items():
                if job == needed[-1]:
                    yield save_image(_sheet(images, needed, title), folder / name)


def _pair(scene: Scene) -> list[tuple[str, Scene, str]]:
    """A pair's images: column, scene and method."""
    concepts = [c.model_copy(update={"lora": moved_files(c.lora, ordinary)}) for c in scene.concepts]
    place = scene.prompt.rpartition(concepts[-1].phrase)[2]
    alone = [scene.model_copy(update={"prompt": f"a {c.phrase}{place}", "concepts": (c,)}) for c in concepts]
    boxed = tuple(c.model_copy(update={"region": box}) for c, box in zip(concepts, BOXES, strict=True))
    boxes = scene.model_copy(update={"concepts": boxed})
    merged = scene.model_copy(update={"concepts": tuple(concepts)})
    scenes = (*alone, merged, merged, merged, boxes, boxes)
    methods = ("merge", "merge", "merge", "draft", "clora", "regional", "lora-composer")
    return list(zip(COLUMNS, scenes, methods, strict=True))


def _sheet(images: Mapping[str, Image.Image], jobs: Sequence[Job], title: str) -> Image.Image:
    """A row for every scene and seed, a column for every part."""
    prompts = {job.scene: job.run.scene.prompt for job in jobs if job.part == "merge"}
    parts, seeds = (list(dict.fromkeys(each)) for each in zip(*((job.part, job.run.seed) for job in jobs), strict=True))
    by_place = {(job.scene, job.part, job.run.seed): images[job.file_name] for job in jobs}
    rows = []
    for name, prompt in prompts.items():
        for i, seed in enumerate(seeds):
            label = (name.replace("-", " + "), f"seed {seed}", *textwrap.wrap(f'"{prompt}"', 22))
            rows.append(Row(label, [by_place[name, part, seed] for part in parts], parted=i == 0))
    lines = [
        f"The playground's model on the CPU, {jobs[0].run.steps} steps, guidance {GUIDANCE:g}.",
        "The images of a row start from the same noise; the seeds were not picked by what they show.",
    ]
    return sheet([COLUMNS[part] for part in parts], rows, title=title, lines=lines)
