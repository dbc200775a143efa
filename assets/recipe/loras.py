"""Trains the LoRAs of the small world's concepts, ordinary and TARA, as `lora-compose train` does.

    PYTHONPATH=assets python -m recipe.loras references prior loras --model M
    PYTHONPATH=assets python -m recipe.loras references prior loras --preset playground-flux --kind ordinary --model M

`references` and `prior` are made by `recipe.concepts`. Existing LoRAs are left alone, an interrupted one is resumed.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_compose.compose.playground.assets import PLAYGROUND, playground_title
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.compose.training import TaraTraining, Training, train
from recipe.concepts import STYLE
from recipe.world import CHARACTERS, STYLE_TRIGGER

KINDS: Mapping[str, Mapping[str, Any]] = {
    "ordinary": {},
    # With convolutions too: attention alone, where the paper has its LoRA, does not learn the shape of a character.
    "tara": {"tara": TaraTraining(), "scope": "convolutions", "rank": 8},
}
"""Kinds of training."""
WORDS = {name: (known.trigger, known.class_word) for name, known in CHARACTERS.items()} | {
    STYLE: (STYLE_TRIGGER, "style")
}


class Preserve(StrEnum):
    """What a training keeps: class images, its captions without the trigger, the empty caption alone, or nothing."""

    IMAGES = "images"
    CAPTIONS = "captions"
    EMPTY = "empty"
    NONE = "none"


@handle_errors()
def main(
    references: Path,
    prior: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="The base model.")] = PLAYGROUND,
    preset: Annotated[str, typer.Option(help="playground, or playground-flux for the transformer.")] = PLAYGROUND,
    kind: Annotated[list[str] | None, typer.Option(help="ordinary or tara; both by default.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help="All by default; repeatable.")] = None,
    preserve: Annotated[Preserve, typer.Option(help="Prior preservation, of subjects.")] = Preserve.IMAGES,
    steps: Annotated[int | None, typer.Option(min=1, help="Other than the preset's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Other than the preset's.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="As of `lora-compose train`.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains all LoRAs that do not exist yet: NAME.safetensors for ordinary ones, NAME-KIND.safetensors for others."""
    if unknown := [each for each in kind or () if each not in KINDS]:
        raise ValueError(f"there is no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    asked = {"steps": steps, "guidance": guidance}
    given: dict[str, Any] = {"threads": threads, "compile": compile}
    given |= {name: value for name, value in asked.items() if value is not None}
    for name in concept or WORDS:
        trigger, class_word = WORDS[name]
        how = Preserve.NONE if name == STYLE else preserve
        prior_batch = {"prior_batch": 1} if how is Preserve.EMPTY else {}  # half of the rows that `captions` has
        for each in kind or KINDS:
            settings = Training.preset(
                preset, images=references / name, class_images=prior / class_word if how is Preserve.IMAGES else None,
                class_count=0, preserve_class=how is Preserve.CAPTIONS, preserve_empty=how is Preserve.EMPTY,
                trigger=trigger, class_word=class_word,
                model=model, out=out / f"{name if each == 'ordinary' else f'{name}-{each}'}.safetensors",
                **KINDS[each], **prior_batch, **given,
            )  # fmt: skip
            if settings.out.exists():
                continue
            with bar(settings.out.stem, settings.steps) as on_progress:
                echo(train(settings, on_step=lambda step, _loss, tell=on_progress: tell(step)))
            set_base(settings.out, playground_title(preset))


def set_base(file: Path, title: str) -> None:
    """Writes into a LoRA file which playground it is for; training knows the folder of its model only."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata | {"base_model": title})


if __name__ == "__main__":
    typer.run(main)
