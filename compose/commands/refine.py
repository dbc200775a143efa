"""`lora-compose refine`: repaints each subject of an image alone."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.asked import check_loras
from lora_compose.compose.commands.options import MethodOption, SaversOption
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.support.terminal import handle_errors, starting


@handle_errors(logging.WARNING)
def refine(
    image: Annotated[Path, typer.Argument(help="A PNG made by lora-compose; its record names model and concepts.")],
    strength: Annotated[
        float, typer.Option(help="Share of the steps that are run for each subject, above 0 to 1.", min=0.01, max=1)
    ] = 0.5,
    subject: Annotated[list[str] | None, typer.Option(help="Only this concept, repeatable; default: all.")] = None,
    method: MethodOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the image; default: NAME-refined.png next to it.")
    ] = None,
    loras: Annotated[Path | None, typer.Option(help="Folder in which moved LoRAs are found by content.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's new location, if it has moved.")] = None,
    savers: SaversOption = None,
) -> None:
    """Repaint each subject alone, enlarged, with its own LoRA.

    Each is cut out, enlarged to the model's own size, repainted, and blended back.

    Subjects are in their regions. Without regions, the image is generated once more to find them by attention.
    """
    record, given = read_record(image), read_pixels(image)
    check_loras(loras)
    with starting():
        from lora_compose.compose.generate.refining import refine_and_save
    to = out or image.with_name(f"{image.stem}-refined.png")
    refine_and_save(
        record, given, to, strength=strength, subjects=subject or (), method=method, loras=loras, model=model,
        savers=savers or (),
    )  # fmt: skip
