"""`lora-compose merge`: several LoRA files into one that opens everywhere."""

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.table import Table
from rich.text import Text

from lora_compose.compose.generate.machine import threads
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.options import parse_settings
from lora_compose.compose.lora.calibration import calibrate, prompt_of
from lora_compose.compose.lora.merging import Given, MergedBlock, Report, check_free, match_files, merge_files
from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_TITLE, lora_source
from lora_compose.compose.support.terminal import bar, out, plain, say
from lora_compose.pipelines.concepts.loading import find_file, read_lora
from lora_compose.pipelines.formats.lora_writer import SPELLINGS, Spelling
from lora_compose.pipelines.merging import MERGERS, Merger, make_merger
from lora_compose.pipelines.scene import Run, Scene

DTYPES = ("float32", "float16", "bfloat16")


def merge(
    files: Annotated[
        list[str],
        typer.Argument(
            help="LoRA files, folders, hub repositories or playground:NAME, each with a weight if it is not 1: "
            "cat.safetensors:0.8. np and k-lora take a subject and then a style."
        ),
    ],
    to: Annotated[Path, typer.Option("--out", help="The file to write, ending with .safetensors.")],
    method: Annotated[str, typer.Option("--method", help=f"{', '.join(MERGERS)}.")] = "cat",
    rank: Annotated[int | None, typer.Option("--rank", help="Cut every layer to this rank.", min=1)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="playground, a folder, a file or a hub repository. soups and ssr need it; otherwise only its names of "
            "layers are used, and the files' family has them as well.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, repeatable: density=0.3")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option("--keys", help="Names of layers as diffusers or kohya write them; as the first file."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; as the files if they agree, else float32.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="The alpha of files that do not say theirs.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="For soups and ssr: a text that shows a LoRA, once for each file; made of their triggers otherwise."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="For soups and ssr: denoising steps of each image.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="For soups and ssr: of the start noise.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="For soups and ssr: cpu, cuda, cuda:1, mps.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .pt, .bin and .ckpt as well: tensors are read, no code is run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, for machines.")] = False,
) -> None:
    """Merges LoRA files into one, layer by layer, and shows how much of each was kept."""
    merger = make_merger(method, parse_settings(settings or []))
    spelling = _spelling(keys)
    kind = _dtype(dtype)
    check_free(to, overwrite)
    _check_number(merger, method, files, prompt)
    with threads(1):  # many small tensors, on which several threads only wait for each other
        given = [_given(text, allow_pickle) for text in files]
    if not any(one.weight for one in given):
        raise ValueError("every weight is 0; there is nothing to merge")
    pipe = _model(model, merger, method, given, device)
    prompts = (prompt or [prompt_of(one) for one in given]) if merger.needs_model else []
    matched = match_files(given, pipe, spelling=spelling, alpha=alpha)
    moments = None
    if merger.needs_model:
        with bar("looking at inputs", 1) as on_progress:
            moments = calibrate(pipe, matched, prompts, steps=steps, seed=seed, on_progress=on_progress)
    with bar("merging", 1) as on_progress, threads(1):
        report = merge_files(
            matched, merger, to, rank=rank, dtype=kind, moments=moments, method=method, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show(report, method)


def parse_weight(text: str) -> tuple[str, float]:
    """A file and its weight, as written on the command line: "cat.safetensors:0.8".

    Raises:
        ValueError: If the weight is not finite.
    """
    source, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not colon or not source:
        return text, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"{text}: the weight is {number}; expected a number such as 0.8")
    return source, weight


def _given(text: str, allow_pickle: bool) -> Given:
    source, weight = parse_weight(text)
    return Given(source, read_lora(find_file(lora_source(source)), allow_pickle=allow_pickle), weight)


def _spelling(keys: str | None) -> Spelling | None:
    if keys is not None and keys not in SPELLINGS:
        raise ValueError(f"--keys is one of {', '.join(SPELLINGS)}, not {keys!r}")
    return next((spelling for spelling in get_args(Spelling) if spelling == keys), None)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, not {name!r}")
    return None if name is None else getattr(torch, name)


def _check_number(merger: Merger, method: str, files: list[str], prompts: list[str] | None) -> None:
    if merger.pair and len(files) != 2:
        raise ValueError(f"{method} takes two files, a subject and then a style; {len(files)} were given")
    if prompts and not merger.needs_model:
        raise ValueError(f"{method} looks at no image; leave --prompt out")
    if prompts and len(prompts) != len(files):
        raise ValueError(f"there are {len(prompts)} prompts for {len(files)} files; expected one for each")


def _model(model: str | None, merger: Merger, method: str, given: list[Given], device: str | None) -> Any:
    """The model that the files are for, if one is needed or named."""
    on_playground = all(one.file.metadata.get("base_model") == PLAYGROUND_TITLE for one in given)
    name = model or (PLAYGROUND if on_playground else None)
    if name is None:
        if merger.needs_model:
            raise ValueError(f"{method} looks at what the layers of a model see; name the model with --model")
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
        say(f"{i}  {source}, weight {weight:g}")
    out.print(table)
    for note in report.notes:
        say(f"note: {note}", style="yellow")
    whole: MergedBlock = report.blocks[-1]
    memory = "" if report.peak_bytes is None else f", {report.peak_bytes / 2**30:.2f} GiB of memory at most"
    say(
        f"{report.out}: {method}, {whole.layers} layers, {report.size / 2**20:.1f} MiB, {report.seconds:.1f} s{memory}",
        style="bold",
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _span(ranks: tuple[int, int]) -> str:
    low, high = ranks
    return str(low) if low == high else f"{low} to {high}"
