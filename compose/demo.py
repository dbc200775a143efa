"""The demo: three scenes of the playground, each concept alone, `merge`, `tara` and `regional`, on one sheet."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from compose.assets import assets_dir
from compose.files import PLAYGROUND, free_path, read_scene, save_image
from compose.models import make, open_model, threads
from compose.sheets import Row, sheet
from pipelines.scene import Concept, Run, Scene

SCENES = ("cat-dog", "car-rabbit", "bear-robot")  # every concept of the playground once
SEEDS = (0, 1, 2)  # the first three, not picked by what they show
STEPS, GUIDANCE = 25, 4.0
THREADS = 1  # a model this small gains little from more, and loses a lot where other programs are busy

COLUMNS = (
    ("concept 1 alone", "its ordinary LoRA"),
    ("concept 2 alone", "its ordinary LoRA"),
    ("merge", "both ordinary LoRAs added up"),
    ("tara", "TARA LoRAs, own words only"),
    ("regional", "ordinary LoRAs, half each"),
)
HALVES = ((0, 0, 64, 128), (64, 0, 128, 128))  # left and right half of the playground's canvas
PARTS = ("first", "second", "merge", "tara", "regional")


@dataclass(frozen=True)
class Job:
    """One picture of the demo: a scene's name, a part of `PARTS`, and the run that makes it."""

    scene: str
    part: str
    run: Run

    @property
    def file_name(self) -> str:
        """Where the picture goes, inside the demo's folder."""
        return f"{self.scene}-{self.part}-{self.run.seed}.png"


@dataclass(frozen=True)
class Shown:
    """What the demo has written: the folder with all pictures, and the sheet in it."""

    folder: Path
    sheet: Path


def jobs(seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> list[Job]:
    """All pictures, so that pictures with the same LoRAs follow each other."""
    made = []
    for name in SCENES:
        scene = read_scene(assets_dir() / "scenes" / f"{name}.yaml")
        for part, part_scene, method in _parts(scene):
            for seed in seeds:
                run = Run(
                    scene=part_scene,
                    model=PLAYGROUND,
                    method=method,
                    steps=steps,
                    guidance_scale=GUIDANCE,
                    seed=seed,
                    device="cpu",
                )
                made.append(Job(name, part, run))
    return made


def show(out: Path, todo: Sequence[Job], on_progress: Callable[[float], None]) -> Shown:
    """Makes the pictures and the sheet.

    Args:
        out: Where to; if there is something already, a numbered folder beside it.
        todo: What to make.
        on_progress: Called with the number of pictures done, fractions included.
    """
    folder = free_path(out)
    pipe = open_model(todo[0].run)
    pictures = {}
    with threads(THREADS):
        for i, job in enumerate(todo):
            made = make(pipe, job.run, lambda share, done=i: on_progress(done + share))
            save_image(made.image, folder / job.file_name, made.record)
            pictures[job.scene, job.part, job.run.seed] = made.image
    seeds = tuple(dict.fromkeys(job.run.seed for job in todo))
    return Shown(folder, save_image(_sheet(pictures, seeds, todo), folder / "sheet.png"))


def _parts(scene: Scene) -> list[tuple[str, Scene, str]]:
    """The scene's five pictures: part, scene and method."""
    ordinary = tuple(_ordinary(concept) for concept in scene.concepts)
    place = scene.prompt.rpartition(ordinary[-1].phrase)[2]
    alone = [scene.model_copy(update={"prompt": f"a {c.phrase}{place}", "concepts": (c,)}) for c in ordinary]
    merged = scene.model_copy(update={"concepts": ordinary})
    halves = [c.model_copy(update={"region": half}) for c, half in zip(ordinary, HALVES, strict=True)]
    divided = scene.model_copy(update={"concepts": tuple(halves)})
    methods = ("merge", "merge", "merge", "tara", "regional")
    return list(zip(PARTS, (*alone, merged, scene, divided), methods, strict=True))


def _ordinary(concept: Concept) -> Concept:
    return concept.model_copy(update={"lora": (concept.lora or "").removesuffix("-tara")})


def _sheet(pictures: dict[tuple[str, str, int], Image.Image], seeds: Sequence[int], todo: Sequence[Job]) -> Image.Image:
    prompts = {job.scene: job.run.scene.prompt for job in todo if job.part == "tara"}
    rows = []
    for name, prompt in prompts.items():
        for i, seed in enumerate(seeds):
            label = (name.replace("-", " + "), f"seed {seed}", *textwrap.wrap(f'"{prompt}"', 22))
            rows.append(Row(label, [pictures[name, part, seed] for part in PARTS], parted=i == 0))
    steps = todo[0].run.steps
    lines = [
        f"The playground's model on the CPU, {steps} steps, guidance {GUIDANCE:g}.",
        "The pictures of a row start from the same noise; the seeds were not picked by what they show.",
    ]
    return sheet(COLUMNS, rows, title="Two concepts, each trained alone", lines=lines)
