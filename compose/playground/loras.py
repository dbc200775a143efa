"""Trains the LoRAs of the playground's concepts, ordinary ones and by TARA, as `lora-compose train` does.

    python -m compose.playground.loras references prior loras --model assets/playground/model
    python -m compose.playground.loras references prior variants --only cat-kv --only dog-kv      (for an ablation)

`references` and `prior` are made by `python -m compose.playground.concepts`. LoRAs that are there already are left
alone, and one that was interrupted goes on.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from compose.files import PLAYGROUND
from compose.playground.concepts import STYLE
from compose.playground.world import CONCEPTS, STYLE_TRIGGER
from compose.terminal import bar, kindly, say
from compose.training import TaraTraining, Training, train

SHIPPED: Mapping[str, Mapping[str, Any]] = MappingProxyType({"": {"tara": None}, "-tara": {"tara": TaraTraining()}})
"""What differs in the training of the LoRAs that come with the playground, by the end of their names."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "-attention": {"tara": None, "scope": "attention"},
        "-kv": {"tara": TaraTraining(), "scope": "cross_kv"},
        "-transformer": {"tara": TaraTraining(), "scope": "transformer"},
        "-unaligned": {"tara": TaraTraining(align_weight=0, start_aligned=False)},
        "-apart": {"tara": TaraTraining(start_aligned=False)},
        "-unmasked": {"tara": TaraTraining(token_mask="inference")},
        "-tied": {"tara": TaraTraining(keys="tied")},
        "-clean": {"tara": TaraTraining(class_target="clean")},
    }
)
"""The same for those that only show what each part of a training does."""


def trainings(
    references: Path, prior: Path, out: Path, model: str, kinds: Mapping[str, Mapping[str, Any]] = SHIPPED, **given: Any
) -> Iterator[Training]:
    """The training of every LoRA, each into a file such as cat.safetensors or cat-tara.safetensors.

    Args:
        references: A folder for each concept.
        prior: A folder for each class word, and one for styles.
        out: Where LoRAs are written.
        model: The base model.
        kinds: What differs, by the end of a name.
        given: Fields of the training that differ from the preset's.
    """
    words = {name: (known.trigger, known.class_word) for name, known in CONCEPTS.items()}
    words[STYLE] = (STYLE_TRIGGER, "style")
    for name, (trigger, class_word) in words.items():
        without = prior / (STYLE if name == STYLE else class_word)
        for suffix, kind in kinds.items():
            yield Training.preset(
                PLAYGROUND, pictures=references / name, class_pictures=without, class_count=0, trigger=trigger,
                class_word=class_word, model=model, out=out / f"{name}{suffix}.safetensors", **{**kind, **given},
            )  # fmt: skip


@kindly()
def main(
    references: Path,
    prior: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="The base model.")] = PLAYGROUND,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of LoRAs, repeatable; all that are shipped by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains all LoRAs that are not there yet."""
    kinds = {**SHIPPED, **ABLATIONS} if only else SHIPPED
    every = {one.out.stem: one for one in trainings(references, prior, out, model, kinds, threads=threads)}
    if unknown := [name for name in only or () if name not in every]:
        raise ValueError(f"there is no LoRA {', '.join(unknown)}; there are {', '.join(every)}")
    for settings in (every[name] for name in only or every):
        if settings.out.exists():
            continue
        with bar(settings.out.stem, settings.steps) as on_progress:
            say(train(settings, on_step=lambda step, _loss, tell=on_progress: tell(step)))


if __name__ == "__main__":
    typer.run(main)
