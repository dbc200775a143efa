"""Trains the LoRAs of the playground's concepts, ordinary ones and by TARA, as `lora-compose train` does.

    python -m compose.playground.loras references prior loras --model assets/playground/model

`references` and `prior` are made by `python -m compose.playground.concepts`. LoRAs that are there already are left
alone, and one that was interrupted goes on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from compose.files import PLAYGROUND
from compose.playground.concepts import STYLE
from compose.playground.world import CONCEPTS, STYLE_TRIGGER
from compose.terminal import bar, kindly, say
from compose.training import TaraTraining, Training, train


def trainings(references: Path, prior: Path, out: Path, model: str, **given: Any) -> Iterator[Training]:
    """The training of every LoRA: NAME.safetensors, and NAME-tara.safetensors.

    Args:
        references: A folder for each concept.
        prior: A folder for each class word, and one for styles.
        out: Where LoRAs are written.
        model: The base model.
        given: Fields of the training that differ from the preset's.
    """
    words = {name: (known.trigger, known.class_word) for name, known in CONCEPTS.items()}
    words[STYLE] = (STYLE_TRIGGER, "style")
    for name, (trigger, class_word) in words.items():
        without = prior / (STYLE if name == STYLE else class_word)
        for suffix, tara in (("", None), ("-tara", TaraTraining())):
            yield Training.preset(
                PLAYGROUND, pictures=references / name, class_pictures=without, class_count=0, trigger=trigger,
                class_word=class_word, tara=tara, model=model, out=out / f"{name}{suffix}.safetensors", **given,
            )  # fmt: skip


@kindly()
def main(
    references: Path,
    prior: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="The base model.")] = PLAYGROUND,
    only: Annotated[list[str] | None, typer.Option(help="Names of LoRAs, repeatable; all by default.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains all LoRAs that are not there yet."""
    todo = [one for one in trainings(references, prior, out, model, threads=threads) if not one.out.exists()]
    todo = [one for one in todo if not only or one.out.stem in only]
    for settings in todo:
        with bar(settings.out.stem, settings.steps) as on_progress:
            say(train(settings, on_step=lambda step, _loss, tell=on_progress: tell(step)))


if __name__ == "__main__":
    typer.run(main)
