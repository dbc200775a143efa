"""How costs grow with concepts, stored LoRAs, images and sizes: counted on SD 1.5 without weights, and drawn.

The host's work is that of real calls on the playground.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file

from lora_compose.compose.benchmark import counting
from lora_compose.compose.benchmark.architectures import SD15, attention_lora, with_lora
from lora_compose.compose.benchmark.host import python_calls
from lora_compose.compose.benchmark.memory import added_memory
from lora_compose.compose.benchmark.outside import spent
from lora_compose.compose.benchmark.peaks import watched
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.compose.benchmark.tables import new_table
from lora_compose.compose.benchmark.timing import lora_tensors
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.terminal import bar, echo, out
from lora_compose.pipelines.concepts.library import ConceptLibrary
from lora_compose.pipelines.methods import Regional
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.text.selection import NamedConcepts, choose_concepts

CONCEPTS, IMAGES, SIZES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (512, 1024, 2048)
STORED = (10, 100, 1000, 10_000)
_WORDS = "abcdefghijklmnopqrstuvwxyz0123456789"  # each a token of its own for CLIP's tokenizers
_NOUNS = ("cat", "dog", "girl", "man")  # class words of stored LoRAs
_STEPS, _GUIDANCE, _SIDE = 1, 5.0, 512
_UNUSED = "789"  # words for prompts that no call had before; of as many timed calls the quickest counts


@dataclass(frozen=True)
class Point:
    """Costs at one number: quantities by name."""

    at: int
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """How costs grow with something."""

    against: str
    points: list[Point]

    def exponents(self) -> dict[str, float]:
        """The exponent p of the growth `a + b n^p` of each quantity; 0 where nothing grows.

        From the last three points, if each is at as many times the number before it.
        """
        first, second, third = self.points[-3:]
        return {
            name: _growth(second.costs[name] - first.costs[name], third.costs[name] - second.costs[name])
            / log(third.at / second.at)
            for name in first.costs
        }


def _growth(first: float, second: float) -> float:
    return log(second / first) if first > 0 and second > 0 else 0.0


def in_columns(number: int, side: int = _SIDE) -> list[Concept]:
    """Up to 32 concepts with a word of one token and a column of the image."""
    edges = [side * i // number for i in range(number + 1)]
    return [
        Concept(name=f"concept {i}", trigger=_WORDS[i], weight=1.0, region=(edges[i], 0, edges[i + 1], side))
        for i in range(number)
    ]


def of_call(unet: Any, concepts: int, images: int, side: int) -> Mapping[str, float]:
    """Latent rows, FLOPs and peak bytes of one step with `regional`."""
    memory = added_memory("meta", [*unet.parameters(), *unet.buffers()])
    loaded = with_lora(in_columns(concepts, side), attention_lora(unet))
    cost = counting.count(
        unet, loaded, Regional(), _STEPS, _GUIDANCE, (side, side), images, watched=watched(memory)
    )  # fmt: skip
    return {"rows": cost.rows_forward, "TFLOP": cost.flops / 1e12, "GiB": memory.peak_bytes / 2**30}


def of_host(numbers: Sequence[int]) -> Iterator[Point]:
    """Python calls, and CPU ms outside of passes, of a call of one step with `regional`, concepts and prompt new."""
    pipe = open_model(Run(scene=Scene(prompt="-"), model=PLAYGROUND, device="cpu", dtype="float32"), ())
    side, tensors = pipe.own_size[0], lora_tensors(pipe)
    with tempfile.TemporaryDirectory() as folder:
        for i, concept in enumerate(in_columns(max(numbers), side)):
            path = Path(folder) / f"{i}.safetensors"  # concepts of one file would share its factors
            save_file(tensors, path)
            pipe.load_concept(path, name=concept.name, trigger=concept.trigger)

    def call(number: int, word: str) -> None:
        concepts = in_columns(number, side)
        pipe.banks.clear()
        pipe(
            prompt=" ".join([word, *_WORDS[:number]]), concepts=concepts, method=Regional(), width=side, height=side,
            num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, output_type="latent",
        )  # fmt: skip

    call(numbers[0], "on")  # what is computed once
    for number in numbers:
        calls = python_calls(partial(call, number, "grass"))
        times = [spent(pipe.model, partial(call, number, word), [time.thread_time])[0].outside for word in _UNUSED]
        yield Point(number, {"Python calls": calls, "CPU ms": 1000 * min(times)})


def of_stored(numbers: Sequence[int]) -> Iterator[Point]:
    """CPU seconds and MiB of registering files by their headers, each into a new library, and of choosing two of them.

    A quarter of the files share a class word, so the two are chosen by their triggers.
    """
    pipe = pipeline_of(counting.meta_unet(SD15), scheduler())
    with tempfile.TemporaryDirectory() as folder:
        written = 0
        for number in numbers:
            for i in range(written, number):
                save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, Path(folder) / f"{i}.safetensors",
                          metadata={"trigger": f"word{i}", "class_word": _NOUNS[i % len(_NOUNS)]})  # fmt: skip
            written = number
            library = ConceptLibrary()
            seconds = _cpu_seconds(partial(library.add, pipe, folder))
            tracemalloc.start()
            library = ConceptLibrary()
            library.add(pipe, folder)
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            chosen = [_cpu_seconds(partial(choose_two, library.concepts, word)) for word in _UNUSED]
            yield Point(number, {"CPU s": seconds, "MiB": kept / 2**20, "CPU ms to choose": 1000 * min(chosen)})


def choose_two(known: Mapping[str, Concept], word: str) -> NamedConcepts:
    """Chooses two of the stored concepts by a prompt with some word."""
    return choose_concepts(f"a word3 {_NOUNS[3]} and a word7 {_NOUNS[7 % len(_NOUNS)]} on {word}", known)


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def curves() -> list[Curve]:
    """Counts all curves."""
    unet = counting.meta_unet(SD15).half()
    wanted = {
        "concepts": (Point(n, of_call(unet, n, 1, _SIDE)) for n in CONCEPTS),
        "concepts, of the host": of_host(CONCEPTS),
        "images": (Point(n, of_call(unet, 2, n, _SIDE)) for n in IMAGES),
        "pixels of a side": (Point(n, of_call(unet, 2, 1, n)) for n in SIZES),
        "stored LoRAs": of_stored(STORED),
    }
    by_axis = {against: Curve(against, []) for against in wanted}
    with bar("counting", 2 * len(CONCEPTS) + len(IMAGES) + len(SIZES) + len(STORED)) as on_progress:
        for done, (against, point) in enumerate(((key, point) for key in wanted for point in wanted[key]), 1):
            by_axis[against].points.append(point)
            on_progress(done)
    return list(by_axis.values())


def draw_growth(path: Path) -> list[Curve]:
    """Counts all curves, prints their exponents and draws them as a PNG; ValueError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            'curves are drawn with matplotlib, which is not installed: pip install "lora-compose[evaluation]"'
        )
    made = curves()
    draw(made, path)
    out.print(growth_table(made))
    echo(path)
    return made


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Writes one panel for each curve and quantity; axes begin at 0, so that what grows linearly is straight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(curve.points[0].costs) for curve in curves)
    figure = Figure(figsize=(3 * columns, 2.4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, curve in enumerate(curves):
        x = [point.at for point in curve.points]
        for column, name in enumerate(curve.points[0].costs):
            axes = figure.add_subplot(len(curves), columns, row * columns + column + 1)
            axes.plot(x, [point.costs[name] for point in curve.points], "o-", color="black", markersize=4, linewidth=1)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{name} by {curve.against}", fontsize=9, loc="left")
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


def growth_table(drawn: Sequence[Curve]) -> Table:
    """Costs at the first and last number of each curve, and the exponents."""
    table = new_table(
        "Counted: one step of SD 1.5 in half precision with regional, LoRAs of rank 8 on all attention layers; of the "
        "host: Python calls, and measured CPU time outside of the model's passes, of a call of one step with new "
        "concepts on the playground; stored LoRAs: CPU time and memory to register them by their headers, and CPU time "
        "to choose two of them by a prompt. p: cost = a + b n^p, by the last three numbers",
        ["what", "by", "from", "to", "first", "last", "p"],
    )
    for curve in drawn:
        first, last, exponents = curve.points[0], curve.points[-1], curve.exponents()
        for name, exponent in exponents.items():
            ends = (f"{point.costs[name]:.3g}" for point in (first, last))
            table.add_row(name, curve.against, str(first.at), str(last.at), *ends, f"{exponent:.2f}")
    return table
