"""`lora-compose inspect`: shows what LoRA files contain."""

import logging
from typing import Annotated

import typer

from lora_compose.compose.files.paths import check_lora
from lora_compose.compose.support.terminal import BAD_INPUT, handle_errors, starting

MAX_RANK = 128


@handle_errors(logging.ERROR)
def inspect(
    files: Annotated[list[str], typer.Argument(help="LoRA files, folders, hub repositories, or playground:NAME.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Match with this model: playground, a folder, a file, a hub repository; default: the playground "
            "or the family's full model, whichever a file was trained on.",
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha for files without one.")] = None,
    max_rank: Annotated[
        int, typer.Option(help="LoHa, LoKr and full differences are approximated at this rank.", min=1)
    ] = MAX_RANK,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also open .pt, .bin and .ckpt: only tensors are read, no code runs.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List all keys that match no layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show LoRA files: format, base model, ranks, triggers, what fits.

    For several files also how much they overlap; of a folder, each file.
    """
    for file in files:
        check_lora(file)
    with starting():
        from lora_compose.compose.lora.inspect_report import show_files
    fine = show_files(
        files, model, alpha=alpha, max_rank=max_rank, allow_pickle=allow_pickle, every_key=keys, as_json=as_json
    )
    if not fine:
        raise typer.Exit(BAD_INPUT)
