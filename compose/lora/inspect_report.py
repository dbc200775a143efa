"""`lora-compose inspect`: shows what LoRA files contain, as tables or JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from lora_compose.compose.generate.models import open_model
from lora_compose.compose.lora.file_inspection import Inspection
from lora_compose.compose.lora.inspection import Overlap, inspect, overlaps
from lora_compose.compose.playground.assets import lora_source, playground_of
from lora_compose.compose.support.terminal import echo, err, out, plain
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import Factors, LoraError, read_lora
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.support.home import expanded


def show_files(
    files: Sequence[str],
    model: str | None,
    *,
    alpha: float | None,
    max_rank: int,
    allow_pickle: bool,
    every_key: bool,
    as_json: bool,
) -> bool:
    """Shows the content of files and the overlap of several; returns whether none has a problem.

    Args:
        files: LoRA files, hub repositories, `playground:NAME`, or folders, of which every file is shown by itself.
        model: The model to match them with; None chooses one for each file.
        max_rank: Rank to which LoHa, LoKr and full differences are cut.
        every_key: Whether all keys are listed that match no layer.
    """
    pipes: dict[str | None, Any] = {}
    seen: list[Inspection] = []
    usable: dict[str | None, list[tuple[str, Factors]]] = {}
    unreadable: list[str] = []
    for source, path in _paths(files):
        try:
            file = read_lora(path or find_file(lora_source(source)), allow_pickle=allow_pickle)
        except LoraError as error:
            if path is None:
                is_only = any(expanded(source).glob("*.safetensors"))  # of a folder
                alone = f"; {source!r} has no other LoRA file" if is_only else ""
                raise LoraError(f"{error}{alone}") from error
            unreadable.append(str(error))
            continue
        name = model or playground_of(file.metadata.get("base_model"))
        if name is not None and name not in pipes:
            pipes[name] = open_model(Run(scene=Scene(prompt="-"), model=name))
        inspection, factors = inspect(file, pipes.get(name), name or "", alpha=alpha, max_rank=max_rank)
        seen.append(inspection)
        if factors is not None and path is None:
            usable.setdefault(inspection.matched_with, []).append((source, factors))
        if not as_json:
            _show(inspection, every_key)
    shared = [overlap for same in usable.values() for overlap in overlaps(same)]
    if as_json:
        everything: dict[str, Any] = {"files": [inspection.model_dump() for inspection in seen]}
        everything |= {"overlaps": [overlap.model_dump() for overlap in shared], "unreadable": unreadable}
        typer.echo(json.dumps(everything, indent=2))
    elif shared:
        _show_overlaps(shared)
    for problem in unreadable:
        echo(f"problem: {problem}", style="red", to=err)
    return not unreadable and not any(inspection.problem for inspection in seen)


def _paths(sources: Sequence[str]) -> Iterator[tuple[str, Path | None]]:
    """What is named, and each file of a folder that has several, with its path."""
    for source in sources:
        folder = expanded(source)
        inside = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if len(inside) > 1:
            yield from ((str(path), path) for path in inside)
        else:
            yield source, None


def _show(inspection: Inspection, every_key: bool) -> None:
    echo(inspection.file, style="bold")
    lines = inspection.rows
    if inspection.matched_with is not None and inspection.problem is None:
        lines.append(
            ("fits", f"{inspection.matched} keys fit {inspection.matched_with}, {len(inspection.unmatched)} do not")
        )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(*_plain_row(label, text))
    out.print(table)
    if inspection.blocks:
        out.print(_blocks_table(inspection))
    shown = inspection.unmatched if every_key else inspection.unmatched[:5]
    for key in shown:
        echo(f"{'no key of an adapter' if inspection.matched_with is None else 'fits no layer'}: {key}", style="yellow")
    if len(shown) < len(inspection.unmatched):
        echo(f"... and {len(inspection.unmatched) - len(shown)} more; --keys lists them", style="yellow")
    for note in inspection.notes:
        echo(f"note: {note}", style="yellow")
    if inspection.problem is not None:
        echo(f"problem: {inspection.problem}", style="red")
    echo("")


def _blocks_table(inspection: Inspection) -> Table:
    matched = any(block.norm is not None for block in inspection.blocks)
    table = Table("block", "layers", "rank", "alpha", *(["norm"] if matched else []))
    for block in inspection.blocks:
        norm = ["" if block.norm is None else f"{block.norm:.3g}"] if matched else []
        table.add_row(*_plain_row(f"{block.part} {block.name}", block.layers, block.rank, block.alpha, *norm))
    return table


def _show_overlaps(shared: Sequence[Overlap]) -> None:
    for overlap in shared:
        first, second = overlap.files
        echo(f"{first} and {second}", style="bold")
        table = Table("block", "overlap of energy")
        for block, share in overlap.blocks:
            table.add_row(*_plain_row(block, f"{share:.2%}"))
        if overlap.whole is not None:
            table.add_row(*_plain_row("all", f"{overlap.whole:.2%}"), style="bold")
            out.print(table)
        echo(f"{overlap.meaning}\n")


def _plain_row(*values: Any) -> list[Text]:
    """Untrusted strings, without markup and control characters."""
    return [Text(plain(value)) for value in values]
