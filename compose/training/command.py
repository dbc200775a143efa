"""`lora-compose train`: trains with progress and clear errors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import typer
from pydantic import ValidationError

from lora_compose.compose.support.terminal import FAILED, bar, echo, err
from lora_compose.compose.training.loop import DivergedError, OnStep, Stopped
from lora_compose.compose.training.loop import train as run_training
from lora_compose.compose.training.model import preset_of
from lora_compose.compose.training.settings import TaraTraining, Training
from lora_compose.pipelines.support.field_errors import field_messages

INTERRUPTED = 130


def train(
    preset: str | None, tara: Mapping[str, Any] | None, fields: Mapping[str, Any], *, fresh: bool, overwrite: bool
) -> None:
    """Trains a LoRA and prints its path. Ctrl-C stops; the same call resumes.

    `tara` and `fields` are those of `TaraTraining` and `Training`; None chooses the preset by the model, and trains
    without TARA. `fresh` deletes a checkpoint first, `overwrite` replaces an existing LoRA. Raises ValueError for
    unusable settings.
    """
    settings = _settings(preset, tara, fields)
    prints = os.environ.get("RANK", "0") == "0"
    if prints:
        echo(f"training {settings.steps} steps on {settings.model}; the LoRA goes to {settings.out}", to=err)
    try:
        with _progress(settings) as on_step:
            path = run_training(settings, on_step=on_step, fresh=fresh, overwrite=overwrite)
    except Stopped as stopped:
        echo(stopped, style="yellow", to=err)
        raise typer.Exit(INTERRUPTED) from stopped
    except torch.OutOfMemoryError as error:
        hint = "use --gradient-checkpointing, --mixed-precision bf16, a smaller --batch-size or --resolution"
        echo(f"out of memory: {str(error).splitlines()[0]}\n{hint}", style="red", to=err)
        raise typer.Exit(FAILED) from error
    except DivergedError as error:
        echo(f"failed: {error}", style="red", to=err)
        raise typer.Exit(FAILED) from error
    if prints:
        echo(
            f"The LoRA: {path} (trigger {settings.trigger!r}, class {settings.class_word!r}, method {settings.method})"
        )


def _settings(preset: str | None, tara: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Training:
    try:
        words = None if tara is None else TaraTraining(**tara)
        return Training.preset(preset or preset_of(fields["model"]), tara=words, **fields)
    except ValidationError as error:
        kind = TaraTraining if error.title == TaraTraining.__name__ else Training
        raise ValueError("\n".join(field_messages(kind, error))) from error


@contextmanager
def _progress(settings: Training) -> Iterator[OnStep]:
    with bar("training", settings.steps) as on_progress:
        smooth: list[float] = []

        def on_step(step: int, loss: float) -> None:
            smooth.append(loss)
            recent = smooth[-20:]
            on_progress(step, f"training, step {step} of {settings.steps}, loss {sum(recent) / len(recent):.4f}")

        yield on_step
