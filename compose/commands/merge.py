"""`lora-compose merge`: several LoRA files into one that opens everywhere."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.asked import parse_settings
from lora_compose.compose.files.paths import check_lora, model_source
from lora_compose.compose.support.names import MERGERS, unknown
from lora_compose.compose.support.terminal import handle_errors, starting
from lora_compose.pipelines.scene.sources import parse_lora


@handle_errors(logging.ERROR)
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
            help="playground, a folder, a file or a hub repository. soups, ssr and iteris need it; the other methods "
            "only read its layer names, which are known for Stable Diffusion and all transformers that are supported.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, repeatable: density=0.3")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option("--keys", help="Spelling of layer names: diffusers or kohya; default: the first file's."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: the files' own, else float32.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha for files without one.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="soups, ssr, iteris: a prompt for each file, in order; default: made from their triggers."),
    ] = None,
    steps: Annotated[int, typer.Option(help="soups, ssr, iteris: denoising steps of each image.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="soups, ssr, iteris: seed of the start noise.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="soups, ssr, iteris: cpu, cuda, cuda:1, mps.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .pt, .bin and .ckpt as well: tensors are read, no code is run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge LoRA files into one, and show how much of each was kept."""
    if method not in MERGERS:
        raise ValueError(unknown("method", method, MERGERS))
    given = [parse_lora(text) for text in files]
    for source, _ in given:
        check_lora(source)
    if model is not None:
        model_source(model)
    options = parse_settings(settings or [])
    with starting():
        from lora_compose.compose.lora.merge_report import merge_and_show
    merge_and_show(
        given, to, method=method, rank=rank, model=model, settings=options, keys=keys, dtype=dtype, alpha=alpha,
        prompts=prompt or [], steps=steps, seed=seed, device=device, allow_pickle=allow_pickle, overwrite=overwrite,
        as_json=as_json,
    )  # fmt: skip
