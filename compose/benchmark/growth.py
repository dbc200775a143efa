"""How costs grow with concepts, stored LoRAs, images and sizes: counted on SD 1.5 without weights, and drawn."""

import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file

from lora_compose.compose.benchmark import counting
from lora_compose.compose.benchmark.architectures import SD15, attention_lora, with_lora
from lora_compose.compose.benchmark.curves import Curve, Point
from lora_compose.compose.benchmark.memory import added_memory
from lora_compose.compose.benchmark.peaks import watched
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.compose.benchmark.tables import new_table
from lora_compose.compose.support.terminal import bar, echo, out
from lora_compose.pipelines.concepts.library import ConceptLibrary
from lora_compose.pipelines.methods import Regional
from lora_compose.pipelines.scene.scene import Concept

CONCEPTS, IMAGES, SIZES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (512, 1024, 2048)
STORED = (10, 100, 1000, 10_000)
_WORDS = "abcdefghijklmnopqrstuvwxyz0123456789"  # each a token of its own for CLIP's tokenizers
_STEPS, _GUIDANCE, _SIDE = 1, 5.0, 512


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
    found = counting.count(
        unet, loaded, Regional(), _STEPS, _GUIDANCE, (side, side), images, watched=watched(memory)
    )  # fmt: skip
    return {"rows": found.rows_forward, "TFLOP": found.flops / 1e12, "GiB": memory.peak_bytes / 2**30}


def of_stored(numbers: Sequence[int]) -> Iterator[Point]:
    """CPU seconds and MiB of registering files by their headers, each into a new library."""
    pipe = pipeline_of(counting.meta_unet(SD15), scheduler())
    with tempfile.TemporaryDirectory() as folder:
        written = 0
        for number in numbers:
            for i in range(written, number):
                save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, Path(folder) / f"{i}.safetensors",
                          metadata={"trigger": f"word{i}"})  # fmt: skip
            written = number
            library = ConceptLibrary()
            start = time.process_time()
            library.add(pipe, folder)
            seconds = time.process_time() - start
            tracemalloc.start()
            library = ConceptLibrary()
            library.add(pipe, folder)
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            yield Point(number, {"CPU s": seconds, "MiB": kept / 2**20})


def curves(
    concepts: Sequence[int] = CONCEPTS, stored: Sequence[int] = STORED, images: Sequence[int] = IMAGES,
    sizes: Sequence[int] = SIZES,
) -> list[Curve]:  # fmt: skip
    """Counts all curves."""
    unet, done = counting.meta_unet(SD15).half(), 0
    found = []
    with bar("counting", len(concepts) + len(stored) + len(images) + len(sizes)) as on_progress:

        def counted(points: Iterator[Point]) -> list[Point]:
            nonlocal done
            every = []
            for point in points:
                every.append(point)
                done += 1
                on_progress(done)
            return every

        found.append(Curve("concepts", counted(Point(n, of_call(unet, n, 1, _SIDE)) for n in concepts)))
        found.append(Curve("images", counted(Point(n, of_call(unet, 2, n, _SIDE)) for n in images)))
        found.append(Curve("pixels of a side", counted(Point(n, of_call(unet, 2, 1, n)) for n in sizes)))
        found.append(Curve("stored LoRAs", counted(of_stored(stored))))
    return found


def draw_growth(path: Path) -> list[Curve]:
    """Counts all curves, prints their exponents and draws them into a PNG.

    Raises:
        ValueError: Without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            'curves are drawn with matplotlib, which is not installed: pip install "lora-compose[evaluation]"'
        )
    from lora_compose.compose.benchmark.growth_plots import draw

    found = curves()
    draw(found, path)
    out.print(growth_table(found))
    echo(path)
    return found


def growth_table(found: Sequence[Curve]) -> Table:
    """Costs at the first and last number of each curve, and the exponents."""
    table = new_table(
        "Counted: one step of SD 1.5 in half precision with regional, LoRAs of rank 8 on all attention layers; stored "
        "LoRAs: CPU time and memory to register them by their headers. p: cost = a + b n^p, by the last three numbers",
        ["what", "by", "from", "to", "first", "last", "p"],
    )
    for curve in found:
        first, last, exponents = curve.points[0], curve.points[-1], curve.exponents()
        for name, exponent in exponents.items():
            ends = (f"{point.costs[name]:.3g}" for point in (first, last))
            table.add_row(name, curve.against, str(first.at), str(last.at), *ends, f"{exponent:.2f}")
    return table
