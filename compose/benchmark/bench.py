"""Costs of methods relative to the plain pipeline: rows, FLOPs and memory computed; seconds, memory, swaps measured."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.table import Table

from lora_compose.compose.benchmark import counting
from lora_compose.compose.benchmark.architectures import (
    ARCHITECTURES,
    TRIGGERS,
    VAE,
    as_called,
    attention_lora,
    columns,
    with_lora,
    without_boxes,
    without_weights,
)
from lora_compose.compose.benchmark.architectures import RANK as LORA_RANK
from lora_compose.compose.benchmark.counting import Counted
from lora_compose.compose.benchmark.growth import draw_growth
from lora_compose.compose.benchmark.hardware import MODELS, capacity_table, need, needs_table, seconds_table
from lora_compose.compose.benchmark.host import HostWork, host_work
from lora_compose.compose.benchmark.many_loaded import measure_requests, requests_table
from lora_compose.compose.benchmark.parts import parts_table, split_cells
from lora_compose.compose.benchmark.peaks import Peak, decoding_bytes, peak
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.compose.benchmark.swapping import RANK, Swaps, measure_swaps
from lora_compose.compose.benchmark.tables import GIB, MIB, new_table
from lora_compose.compose.benchmark.timing import GUIDANCE, Job, open_with_concepts, time_rows, times_table
from lora_compose.compose.benchmark.transformers import (
    IMAGE_TOKENS,
    READING,
    REGION_TOKENS,
    SHOWN,
    TOKENS,
    PassCost,
    pass_cost,
    texts_of,
)
from lora_compose.compose.generate.defaults import defaults_of, precision
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.names import STRUCTURES
from lora_compose.compose.support.savers import TILE, Saver, check_savers, enable_tiling, in_order
from lora_compose.compose.support.terminal import bar, bar_over, echo, out
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.families.flux3 import PAD_MULTIPLE
from lora_compose.pipelines.methods import Settings, make_method
from lora_compose.pipelines.scene.scene import Run, Scene


@dataclass(frozen=True)
class CountedRow:
    """The costs of a method and of the plain pipeline on an architecture."""

    architecture: str
    method: str
    concepts: int
    cost: Counted
    plain: Counted


@dataclass(frozen=True)
class PeakRow:
    """The memory of a method (None: the plain pipeline) on an architecture.

    `checkpointed` is with gradient checkpointing; None where there are no gradients.
    """

    architecture: str
    method: str | None
    concepts: int
    peak: Peak
    checkpointed: Peak | None


_Row = TypeVar("_Row", CountedRow, PeakRow)


@dataclass(frozen=True)
class HostRow:
    """The work of the host for a method on a model."""

    method: str
    concepts: int
    work: HostWork


@dataclass(frozen=True)
class PassRow:
    """The costs of a pass of a transformer: with `regional`, plain, and plain without reference images."""

    model: str
    concepts: int
    references: int
    cost: PassCost
    plain: PassCost
    without_references: PassCost


def bench(
    methods: Sequence[str],
    concepts: Sequence[int],
    *,
    settings: Mapping[str, Any],
    steps: int,
    count: bool,
    boxes: bool,
    memory: bool,
    transformers: bool,
    references: int,
    hardware: bool,
    calls: bool,
    time: bool,
    swap: bool,
    loaded: int,
    growth: Path | None,
    model: str,
    device: str | None,
    dtype: str | None,
    size: int | None,
    savers: Collection[Saver],
    pairs: int,
    peaks: bool,
    to: Path | None,
) -> None:
    """Shows the costs of methods relative to the plain pipeline: what is counted, computed or measured, as asked for.

    Counting is the default; with `boxes` every concept has one there. `pairs` are timed rounds: a plain call, one of
    each method, and PEFT's; `loaded` are the LoRAs of which each request of `swap` has others; `to` is a file for the
    numbers. Device and precision that are None are those of a run. Raises ValueError for unknown methods and settings.
    """
    cells = [(name, number) for name in methods for number in concepts]
    count = count or not (memory or transformers or hardware or calls or time or swap or growth)
    for name, _ in cells:
        make_method(name, settings)
    if boxes and not count:
        raise ValueError("--boxes is for what is counted: give --count with it")
    if references and not transformers:
        raise ValueError("--references is for passes of transformers: give --transformers with it")
    if savers and not time:
        raise ValueError("--save-memory is for what is timed: give --time with it (--memory shows both ways by itself)")
    real_calls = calls or time or swap
    of_calls = {"--model": model != PLAYGROUND, "--device": device, "--dtype": dtype, "--size": size}
    if unread := [name for name, given in of_calls.items() if given and not real_calls]:
        raise ValueError(f"{', '.join(unread)}: for real calls; give --time, --calls or --swap with it")
    saving, device = in_order(savers), choose_device(device)
    dtype = dtype or (_precision(model, device) if real_calls else "float32")
    check_savers(saving, device)
    real = Job(model, device, 1, settings=settings, dtype=dtype, size=size)
    numbers: dict[str, Any] = {"steps": steps, "guidance_scale": GUIDANCE, "settings": settings}
    if count:
        counted = count_cells(cells, steps, settings, boxes=boxes)
        out.print(counts_table(counted, steps, boxes))
        numbers["counted"] = [asdict(row) for row in counted]
    if memory:
        computed = peak_cells(cells, steps, settings)
        out.print(peaks_table(computed, steps))
        numbers["peaks"] = [asdict(row) for row in computed]
        numbers["decoding"] = decoding = decoding_bytes_by_architecture()
        for name, (whole, tiled) in decoding.items():
            echo(f"decoding on {name}, in float32: {whole / GIB:.1f} GiB; in tiles of {TILE} pixels {tiled / GIB:.1f}")
    if transformers:
        passes = pass_cells(concepts, references=references)
        out.print(passes_table(passes))
        numbers["passes"] = [asdict(row) for row in passes]
    if hardware:
        needs = dict(zip(MODELS, bar_over("computing", MODELS, need), strict=True))
        out.print(needs_table(needs))
        out.print(seconds_table(needs))
        out.print(capacity_table(needs))
        numbers["hardware"] = {name: asdict(requirement) for name, requirement in needs.items()}
    if calls:
        worked = host_cells(cells, real)
        out.print(host_table(worked, f"{model} on {device}"))
        numbers["calls"] = [asdict(row) for row in worked]
        parts = split_cells(cells, real)
        out.print(parts_table(parts, f"{model} on {device}"))
        numbers["parts"] = [asdict(row) for row in parts]
    if time:
        timed = time_rows(methods, concepts, replace(real, steps=steps, savers=saving), pairs, peaks=peaks)
        shown = [] if size is None else [f"{size} x {size}"]
        what = [f"{model} on {device}", dtype, *saving, *shown, f"{steps} steps", f"{pairs} interleaved rounds"]
        out.print(times_table(timed, ", ".join(what)))
        numbers |= {"model": model, "save_memory": saving, "device": device}
        numbers |= {"dtype": dtype, "size": size, "pairs": pairs}
        numbers["timed"] = [asdict(row) for row in timed]
    if swap:
        with bar("measuring swaps"):
            swaps = measure_swaps(device)
        out.print(swaps_table(swaps, device))
        numbers["swaps"] = asdict(swaps)
        requests = measure_requests(real, loaded, pairs)
        out.print(requests_table(requests, f"{model} on {device}, {dtype}"))
        numbers["requests"] = asdict(requests)
    if growth is not None:
        numbers["growth"] = [asdict(curve) for curve in draw_growth(growth)]
    if to is not None:
        to.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        echo(to)


def count_cells(
    cells: Sequence[tuple[str, int]], steps: int, settings: Mapping[str, Any] | None = None, *, boxes: bool = False
) -> list[CountedRow]:
    """Counts methods on every architecture, by number of concepts; with boxes only where needed, or for all."""
    rows = []
    with bar("counting", len(ARCHITECTURES) * len(cells)) as on_progress:
        for architecture, config in ARCHITECTURES.items():
            unet = counting.meta_unet(config)
            how = steps, GUIDANCE, (unet.config["sample_size"] * 8,) * 2
            plain, called = counting.count(unet, (), None, *how), _callable_on(unet, boxes=boxes)
            for name, number in cells:
                method = make_method(name, settings)
                cost = counting.count(unet, called(method, number), method, *how)
                rows.append(CountedRow(architecture, name, number, cost, plain))
                on_progress(len(rows))
    return rows


def _callable_on(unet: UNet2DConditionModel, *, boxes: bool) -> Callable[[Settings, int], list[LoadedConcept]]:
    """Gives the concepts of a call, by method and number of concepts."""
    side, lora = unet.config["sample_size"] * 8, attention_lora(unet)
    if boxes:
        return lambda _, number: with_lora(columns(number, side, side), lora)
    pipe = pipeline_of(unet, scheduler())
    concepts = with_lora(without_boxes(columns(len(TRIGGERS), side, side)), lora)
    pipe.library.loaded.update({loaded.concept.name: loaded for loaded in concepts})
    return lambda method, number: with_lora(as_called(pipe, method, number, side, side), lora)


def counts_table(rows: Sequence[CountedRow], steps: int, boxes: bool) -> Table:
    """Latent rows of an image, and FLOPs relative to the plain pipeline's."""
    plain = {row.architecture: row.plain for row in rows}
    whole = ", ".join(f"{cost.flops / 1e12:.0f} TFLOP on {name}" for name, cost in plain.items())
    table = new_table(
        f"Counted: one image, {steps} steps with guidance; FLOPs of the UNet as a ratio to the plain pipeline "
        f"({whole}), and those before the first step in plain steps. latent rows: full, truncated (stopped), and "
        f"backward. {'Every concept has a box' if boxes else 'Concepts have boxes only where a method needs them'}",
        ["method", "N", "rows", "stopped", "back", *(header for name in plain for header in (name, "before"))],
    )
    table.add_row("plain", "0", *_rows(next(iter(plain.values()))), *["1.000", "-"] * len(plain))
    for (method, number), counted in _by_cell(rows).items():
        ratios = [text for row in counted for text in _ratios(row, steps)]
        table.add_row(method, str(number), *_rows(counted[0].cost), *ratios)
    return table


def _by_cell(rows: Sequence[_Row]) -> dict[tuple[str, int], list[_Row]]:
    """Rows of all architectures by method and number of concepts, in their order."""
    cells: dict[tuple[str, int], list[_Row]] = {}
    for row in rows:
        cells.setdefault((row.method or "plain", row.concepts), []).append(row)
    return cells


def peak_cells(
    cells: Sequence[tuple[str, int]], steps: int, settings: Mapping[str, Any] | None = None
) -> list[PeakRow]:
    """Computes the memory of the plain pipeline and of methods on every architecture, by number of concepts."""
    rows, all_cells = [], [(None, 0), *cells]
    with bar("computing", len(ARCHITECTURES) * len(all_cells)) as on_progress:
        for architecture, config in ARCHITECTURES.items():
            unet = counting.meta_unet(config).half()
            side, called = unet.config["sample_size"] * 8, _callable_on(unet, boxes=False)
            for method, number in all_cells:
                chosen = None if method is None else make_method(method, settings)
                concepts = [] if chosen is None else called(chosen, number)
                call = unet, concepts, chosen, steps, GUIDANCE, (side, side)
                kept = peak(*call)
                again = peak(*call, gradient_checkpointing=True) if kept.updates else None
                rows.append(PeakRow(architecture, method, number, kept, again))
                on_progress(len(rows))
    return rows


def decoding_bytes_by_architecture() -> dict[str, tuple[int, int]]:
    """Bytes to decode an image in float32, whole and in tiles, VAE included."""
    sizes = {}
    for name, config in ARCHITECTURES.items():
        side = config["sample_size"] * 8
        with counting.META:
            vae = AutoencoderKL(**VAE, sample_size=side).eval()
        whole = decoding_bytes(vae, (side, side))
        enable_tiling(vae)
        sizes[name] = whole, decoding_bytes(vae, (side, side))
    return sizes


def peaks_table(rows: Sequence[PeakRow], steps: int) -> Table:
    """GiB without and with gradient checkpointing, and its cost in FLOPs."""
    names = list(dict.fromkeys(row.architecture for row in rows))
    table = new_table(
        f"Computed: GiB of UNet, LoRAs and passes in half precision, one image, {steps} steps with guidance; then "
        "with gradient checkpointing, and the FLOPs with it relative to those without",
        ["method", "N", *(header for name in names for header in (name, "checkp.", "more"))],
    )
    for (method, number), measured in _by_cell(rows).items():
        table.add_row(method, str(number), *(text for row in measured for text in _gibibytes(row)))
    return table


def pass_cells(concepts: Sequence[int], models: Sequence[str] | None = None, *, references: int = 0) -> list[PassRow]:
    """Computes one pass of transformers at 1024 x 1024 in bfloat16, by number of regions.

    By default of all models, or with reference images of that size, of those that read some, and without concepts too.
    """
    families = READING if references else SHOWN
    models = models or tuple(families)
    concepts = [0, *concepts] if references else concepts
    rows = []
    with bar("counting", len(models) * len(concepts)) as on_progress:
        for name in models:
            model = without_weights(families[name]).transformer.bfloat16()

            def cost(number: int, references: int, model: Any = model, name: str = name) -> PassCost:
                return pass_cost(model, number, LORA_RANK, (128, 128), *texts_of(name, references), references)

            plain = cost(0, references)
            bare = cost(0, 0) if references else plain
            for number in concepts:
                rows.append(PassRow(name, number, references, cost(number, references), plain, bare))
                on_progress(len(rows))
    return rows


def passes_table(rows: Sequence[PassRow]) -> Table:
    """FLOPs and memory of a pass, as ratios to the plain model, and to that without reference images."""
    references, header = "", ["model", "N", "TFLOP", "ratio", "GiB", "ratio", "GiB by blocks", "plain"]
    if rows and rows[0].references:
        references = f"; {rows[0].references} reference images of that size, which Qwen-Image-Edit-Plus also reads as "
        references += f"{IMAGE_TOKENS} tokens in every text"
        header += ["TFLOP to none", "GiB to none"]
    table = new_table(
        f"Counted: one pass at 1024 x 1024 in bfloat16 with regional, LoRAs of rank {LORA_RANK} on all linear layers "
        f"that see text or image, {TOKENS} tokens and {REGION_TOKENS} for each region (FLUX.3: {PAD_MULTIPLE})"
        f"{references}",
        header,
    )
    for row in rows:
        cost, plain, bare = row.cost, row.plain, row.without_references
        cells = [
            row.model, str(row.concepts), f"{cost.flops / 1e12:.1f}", f"{cost.flops / plain.flops:.3f}",
            f"{cost.peak_bytes / GIB:.1f}", f"{cost.peak_bytes / plain.peak_bytes:.3f}",
            f"{cost.offloaded_bytes / GIB:.2f}", f"{plain.offloaded_bytes / GIB:.2f}",
        ]  # fmt: skip
        if row.references:
            cells += [f"{cost.flops / bare.flops:.3f}", f"{cost.peak_bytes / bare.peak_bytes:.3f}"]
        table.add_row(*cells)
    return table


def host_cells(cells: Sequence[tuple[str, int]], plain: Job) -> list[HostRow]:
    """Counts the work of the host for methods, by number of concepts."""
    pipe = open_with_concepts(replace(plain, concepts=max(number for _, number in cells)))

    def row(cell: tuple[str, int]) -> HostRow:
        return HostRow(*cell, host_work(pipe, replace(plain, method=cell[0], concepts=cell[1])))

    return bar_over("counting", cells, row)


def host_table(rows: Sequence[HostRow], what: str) -> Table:
    """Python calls, operations and CPU time that a method adds to the plain pipeline."""
    table = new_table(
        f"Counted: {what}; Python calls and operations on tensors that a method adds to a call of the plain pipeline, "
        "but for its steps: with new concepts, and with those of the call before; and to a step. ms: CPU time that it "
        "adds to a call of one step, but for forward passes",
        ["method", "N", "new", "ops", "ms", "again", "ops", "ms", "step", "ops"],
    )
    for row in rows:
        first, again, step = (
            (str(work.python_calls), str(work.operations)) for work in (row.work.first, row.work.again, row.work.step)
        )
        times = (f"{ms:.1f}" for ms in (row.work.first_ms, row.work.again_ms))
        table.add_row(row.method, str(row.concepts), *first, next(times), *again, next(times), *step)
    return table


def _precision(model: str, device: str) -> str:
    """The precision of a run that names none; models with random weights are UNets."""
    if model in STRUCTURES:
        return precision(device, unet=True)
    return defaults_of(Run(scene=Scene(prompt="-"), model=model, device=device)).dtype


def swaps_table(swaps: Swaps, device: str) -> Table:
    """Milliseconds by file."""
    table = new_table(
        f"Measured: LoRA files of rank {RANK} for SD 1.5, {swaps.file_bytes / MIB:.1f} MiB each, on {device}; "
        "milliseconds by file. The last row is part of every call",
        ["what", "ms"],
    )
    table.add_row("registered by its header", f"{swaps.adding:.2f}")
    table.add_row("first used: read, checked, matched", f"{swaps.reading:.1f}")
    table.add_row("used again, in place of another", f"{swaps.swapping:.2f}")
    table.add_row("installed in the model and removed, first call", f"{swaps.installing:.1f}")
    table.add_row("the same, further calls", f"{swaps.installing_again:.1f}")
    return table


def _rows(cost: Counted) -> tuple[str, str, str]:
    stopped, backward = (f"{rows:g}" if rows else "-" for rows in (cost.rows_stopped, cost.rows_backward))
    return f"{cost.rows_forward:g}", stopped, backward


def _ratios(row: CountedRow, steps: int) -> tuple[str, str]:
    plain = row.plain.flops
    return f"{row.cost.flops / plain:.3f}", f"{row.cost.preparation_flops * steps / plain:.3f}"


def _gibibytes(row: PeakRow) -> tuple[str, str, str]:
    kept, again = row.peak, row.checkpointed
    if again is None:
        return f"{kept.peak_bytes / GIB:.1f}", "-", "-"
    return f"{kept.peak_bytes / GIB:.1f}", f"{again.peak_bytes / GIB:.1f}", f"{again.flops / kept.flops:.2f}"
