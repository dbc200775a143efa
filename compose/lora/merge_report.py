"""`lora-compose merge`: merges LoRA files into one, and shows how much of each was kept."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import typer
from rich.table import Table
from rich.text import Text

from lora_compose.compose.generate.machine import threads
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, Report, check_free, merge_files
from lora_compose.compose.playground.assets import lora_source, playground_of
from lora_compose.compose.support.terminal import bar, echo, out, plain
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.formats.lora_writer import SPELLINGS, Spelling
from lora_compose.pipelines.merging import Merger, make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from lora_compose.pipelines.merging.changes import check_number
from lora_compose.pipelines.scene.scene import Run, Scene

DTYPES = ("float32", "float16", "bfloat16")


def merge_and_show(
    files: Sequence[tuple[str, float]],
    to: Path,
    *,
    method: str,
    rank: int | None,
    model: str | None,
    settings: Mapping[str, Any],
    keys: str | None,
    dtype: str | None,
    alpha: float | None,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    device: str | None,
    allow_pickle: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merges LoRA files into one and shows how much of each was kept.

    Rank, keys and precision that are None are the method's, and the files' own; without a model it is read from the
    files. There is a prompt for each file, by default made from the triggers, for methods that generate images. Raises
    ValueError for anything that does not fit together; nothing is written then.
    """
    merger = make_merger(method, settings)
    spelling = _spelling(keys)
    kind = _dtype(dtype)
    check_free(to, overwrite)
    _check_number(merger, method, files, prompts)
    with threads(1):  # many small tensors, on which several threads only wait for each other
        read = partial(read_lora, allow_pickle=allow_pickle)
        given = [Given(source, read(find_file(lora_source(source))), weight) for source, weight in files]
    if not any(entry.weight for entry in given):
        raise ValueError("every weight is 0; there is nothing to merge")
    pipe = _model(model, merger, method, given, device)
    if merger.needs_model:
        prompts = prompts or [prompt_of(entry.file, entry.source) for entry in given]
    matched = match_files(given, pipe, spelling=spelling, alpha=alpha)
    moments = None
    if merger.needs_model:
        with bar("looking at inputs", 1) as on_progress:
            moments = calibrate(
                pipe, matched.changes, list(prompts), merger, steps=steps, seed=seed, on_progress=on_progress
            )
    with bar("merging", 1) as on_progress, threads(1):
        report = merge_files(
            matched, merger, to, rank=rank, dtype=kind, moments=moments, method=method, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show(report, method)


def _spelling(keys: str | None) -> Spelling | None:
    if keys is not None and keys not in SPELLINGS:
        raise ValueError(f"--keys must be one of {', '.join(SPELLINGS)}, not {keys!r}")
    return next((spelling for spelling in get_args(Spelling) if spelling == keys), None)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return None if name is None else getattr(torch, name)


def _check_number(merger: Merger, method: str, files: Sequence[tuple[str, float]], prompts: Sequence[str]) -> None:
    check_number(merger, method, len(files))
    if prompts and not merger.needs_model:
        raise ValueError(f"{method} generates no images; leave --prompt out")
    if prompts and len(prompts) != len(files):
        raise ValueError(f"there are {len(prompts)} prompts for {len(files)} files; expected one for each")


def _model(model: str | None, merger: Merger, method: str, given: list[Given], device: str | None) -> Any:
    """The model that the files are for, if one is needed or named."""
    playgrounds = {playground_of(entry.file.metadata.get("base_model")) for entry in given}
    name = model or (playgrounds.pop() if len(playgrounds) == 1 else None)
    if name is None:
        if merger.needs_model:
            raise ValueError(f"{method} needs the inputs of the model's layers; name the model with --model")
        return None
    return open_model(Run(scene=Scene(prompt="-"), model=name, device=device if merger.needs_model else "cpu"))


def _show(report: Report, method: str) -> None:
    kept = [f"kept {i}" for i, _ in enumerate(report.files, 1)]
    table = Table("block", "layers", "rank", "energy", *kept, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.columns[0].no_wrap = True
    several = len(report.files) > 1
    cut = any(block.cut < 1 - 1e-9 for block in report.blocks)
    for column in [*(["overlap"] if several else []), *(["cut keeps"] if cut else [])]:
        table.add_column(column)
    for block in report.blocks:
        ranks = f"{_span(block.ranks_before)} -> {_span(block.ranks_after)}"
        cells = [block.name, block.layers, ranks, _share(block.energy), *map(_share, block.kept)]
        cells += [_share(max(block.overlaps))] if several else []
        cells += [_share(block.cut)] if cut else []
        table.add_row(*[Text(plain(cell)) for cell in cells], style="bold" if block is report.blocks[-1] else None)
    for i, (source, weight) in enumerate(report.files, 1):
        echo(f"{i}  {source}, weight {weight:g}")
    out.print(table)
    for note in report.notes:
        echo(f"note: {note}", style="yellow")
    whole = report.blocks[-1]
    memory = "" if report.peak_bytes is None else f", {report.peak_bytes / 2**30:.2f} GiB of memory at most"
    echo(
        f"{report.out}: merged with method {method}, {whole.layers} layers, {report.size / 2**20:.1f} MiB, "
        f"{report.seconds:.1f} s{memory}",
        style="bold",
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _span(ranks: tuple[int, int]) -> str:
    low, high = ranks
    return str(low) if low == high else f"{low} to {high}"
