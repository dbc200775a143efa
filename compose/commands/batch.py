"""`lora-compose batch`: images of many scenes and seeds."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_compose.compose.batch.entries import BatchScenes, read_entries
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.commands import asked as reading
from lora_compose.compose.commands import options
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.files.validation import validated
from lora_compose.compose.support.names import check_method
from lora_compose.compose.support.terminal import BAD_INPUT, echo, err, handle_errors, starting
from lora_compose.pipelines.support.quantising import check_quantize


@handle_errors(logging.ERROR)
def batch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SCENES...",
            help="Scene files, folders of them, tables (.csv, .tsv, .jsonl), or one batch file (YAML or JSON with "
            "settings and scenes).",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="playground, a folder, a .safetensors file, or a hub repository.")
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help='For tables: a scene file in which columns fill placeholders, "a {animal} on {place}".'),
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help=f"For tables, in every row. {options.LORA_HELP}")] = None,
    box: options.BoxOption = None,
    concept: Annotated[list[str] | None, typer.Option(help=f"For tables, in every row. {options.CONCEPT_HELP}")] = None,
    method: options.MethodOption = None,
    settings: options.SetOption = None,
    seed: Annotated[
        list[str] | None,
        typer.Option(help="Seeds of scenes without seeds of their own, repeatable: 3, or 0-7. Default: 0."),
    ] = None,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    scheduler: options.SchedulerOption = None,
    dtype: options.DtypeOption = None,
    quantize: options.QuantizeOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the fastest, and every GPU.")
    ] = None,
    savers: options.SaversOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images of a scene made in one call; pixels depend on it. Default: 1.", min=1, max=64),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of a process; pixels depend on it. Default: torch's.", min=1)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the images: NAME-SEED.png. A rerun resumes; processes that share it share the work."
        ),
    ] = Path("outputs/batch"),
    processes: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: one per GPU.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace images of the same names that were made in another way.")
    ] = False,
    ray: options.RayOption = None,
    joins: Annotated[bool, typer.Option("--join", hidden=True)] = False,
) -> None:
    """Generate images of many scenes and seeds. A rerun resumes; further processes join in."""
    concepts = reading.concepts_of(concept or [], lora or [], box or [])
    scenes = read_entries(sources, template, concepts)
    given = {
        "model": model, "method": method, "settings": reading.parse_settings(settings) if settings else None,
        "seeds": seed, "steps": steps, "guidance_scale": guidance, "scheduler": scheduler, "dtype": dtype,
        "quantize": quantize, "device": device, "save_memory": tuple(savers) if savers else None,
        "batch_size": batch_size, "threads": threads,
    }  # fmt: skip
    asked = _settings(scenes, {name: value for name, value in given.items() if value is not None})
    reading.check_ray(ray)
    with starting():
        from lora_compose.compose.batch.command import join, make_all
    if joins:  # what `--processes 2` starts twice
        join(scenes.entries, asked, out, replace=replace)
    elif code := make_all(scenes, asked, out, processes, replace=replace, ray=ray):
        raise typer.Exit(code)


def _settings(scenes: BatchScenes, given: dict[str, Any]) -> BatchSettings:
    """The settings of a batch file, overridden by options.

    Raises ValueError for unusable settings and names, a line each, and typer.Exit if no scene can be made.
    """
    fields = {**scenes.settings, **given}
    if "model" not in fields:
        raise ValueError("there is no model; give --model NAME, or a batch file with a model in it")
    settings = validated(BatchSettings, fields, "settings")
    check_method(settings.method)
    model_source(settings.model)
    check_quantize(settings.quantize)
    if not scenes.entries:
        for entry in scenes.bad:
            echo(f"error: {entry.error}", style="red", to=err)
        raise typer.Exit(BAD_INPUT)
    return settings
