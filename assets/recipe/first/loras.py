"""Trains the LoRAs of playground-flux, as `lora-compose train` does.

    python -m recipe.first.loras references prior loras --model assets/playground-flux/model --threads 1

`references` and `prior` are made by `python -m recipe.first.concepts`. Existing LoRAs are left alone, and an
interrupted one is resumed.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_compose.compose.playground.assets import PLAYGROUND_FLUX
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.compose.training import Training, train
from recipe.first.concepts import STYLE
from recipe.first.world import CONCEPTS, STYLE_TRIGGER

WORDS = {name: (known.trigger, known.class_word) for name, known in CONCEPTS.items()} | {
    STYLE: (STYLE_TRIGGER, "style")
}


def trainings(
    references: Path, prior: Path, out: Path, model: str, concepts: Iterable[str] = tuple(WORDS), **given: Any
) -> Iterator[Training]:
    """The training of every LoRA: NAME.safetensors.

    Args:
        references: A folder for each concept.
        prior: A folder for each class word. Styles are trained without.
        out: The folder for LoRAs.
        model: The base model.
        concepts: The concepts.
        given: Fields of the training that differ from the preset's.

    Raises:
        ValueError: For unknown concepts.
    """
    concepts = tuple(concepts)
    if unknown := [name for name in concepts if name not in WORDS]:
        raise ValueError(f"there is no concept {', '.join(unknown)}; there are {', '.join(WORDS)}")
    for name in concepts:
        trigger, class_word = WORDS[name]
        without = None if name == STYLE else prior / class_word
        yield Training.preset(
            PLAYGROUND_FLUX, images=references / name, class_images=without, class_count=0, trigger=trigger,
            class_word=class_word, model=model, out=out / f"{name}.safetensors", **given,
        )  # fmt: skip


@handle_errors()
def main(
    references: Path,
    prior: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="The base model.")] = PLAYGROUND_FLUX,
    concept: Annotated[list[str] | None, typer.Option(help="All by default; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Other than the preset's.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains all LoRAs that do not exist yet."""
    given: dict[str, Any] = {"threads": threads} | ({} if steps is None else {"steps": steps})
    for settings in trainings(references, prior, out, model, concept or WORDS, **given):
        if settings.out.exists():
            continue
        with bar(settings.out.stem, settings.steps) as on_progress:
            echo(train(settings, on_step=lambda step, _loss, tell=on_progress: tell(step)))


if __name__ == "__main__":
    typer.run(main)
