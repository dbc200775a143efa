"""Trains the LoRAs of the playground's concepts, ordinary and TARA, as `lora-compose train` does.

    python -m recipe.first.loras references prior loras --model assets/playground/model
    python -m recipe.first.loras references prior loras --kind kv --kind tied  (an ablation)
    python -m recipe.first.loras references prior loras --preset playground-flux \
        --model assets/playground-flux/model --kind ordinary --threads 1

`references` and `prior` are made by `python -m recipe.first.concepts`. Existing LoRAs are
left alone, and an interrupted one is resumed.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.compose.training import TaraTraining, Training, train
from recipe.first.concepts import STYLE
from recipe.first.world import CONCEPTS, STYLE_TRIGGER

KINDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ordinary": {"tara": None},
        "tara": {"tara": TaraTraining()},
        "attention": {"tara": None, "scope": "attention"},
        "kv": {"tara": TaraTraining(), "scope": "cross_kv"},
        "transformer": {"tara": TaraTraining(), "scope": "transformer"},
        "unaligned": {"tara": TaraTraining(align_weight=0, start_aligned=False)},
        "apart": {"tara": TaraTraining(start_aligned=False)},
        "unmasked": {"tara": TaraTraining(token_mask="inference")},
        "tied": {"tara": TaraTraining(keys="tied")},
        "clean": {"tara": TaraTraining(class_target="clean")},
    }
)
"""Kinds of training. The first two come with the playground; the others show the effect of each part."""

SHIPPED = ("ordinary", "tara")
WORDS = {name: (known.trigger, known.class_word) for name, known in CONCEPTS.items()} | {
    STYLE: (STYLE_TRIGGER, "style")
}


def trainings(
    references: Path,
    prior: Path,
    out: Path,
    model: str,
    kinds: Iterable[str] = SHIPPED,
    concepts: Iterable[str] = tuple(WORDS),
    preset: str = PLAYGROUND,
    **given: Any,
) -> Iterator[Training]:
    """The training of every LoRA: NAME.safetensors for ordinary ones, NAME-KIND.safetensors for others.

    Args:
        references: A folder for each concept.
        prior: A folder for each class word. Styles are trained without.
        out: The folder for LoRAs.
        model: The base model.
        kinds: Of `KINDS`.
        concepts: The concepts.
        preset: "playground", or "playground-flux" for the transformer.
        given: Fields of the training that differ from the preset's.

    Raises:
        ValueError: For unknown kinds and concepts.
    """
    kinds, concepts = tuple(kinds), tuple(concepts)
    for what, names, known in (("kind", kinds, KINDS), ("concept", concepts, WORDS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"there is no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    for name in concepts:
        trigger, class_word = WORDS[name]
        without = None if name == STYLE else prior / class_word
        for kind in kinds:
            stem = name if kind == "ordinary" else f"{name}-{kind}"
            yield Training.preset(
                preset, images=references / name, class_images=without, class_count=0, trigger=trigger,
                class_word=class_word, model=model, out=out / f"{stem}.safetensors", **{**KINDS[kind], **given},
            )  # fmt: skip


@handle_errors()
def main(
    references: Path,
    prior: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="The base model.")] = PLAYGROUND,
    preset: Annotated[str, typer.Option(help="playground, or playground-flux for the transformer.")] = PLAYGROUND,
    kind: Annotated[list[str] | None, typer.Option(help="Ordinary and TARA by default; repeatable.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help="All by default; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Other than the preset's.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains all LoRAs that do not exist yet."""
    given: dict[str, Any] = {"threads": threads} | ({} if steps is None else {"steps": steps})
    for settings in trainings(references, prior, out, model, kind or SHIPPED, concept or WORDS, preset, **given):
        if settings.out.exists():
            continue
        with bar(settings.out.stem, settings.steps) as on_progress:
            echo(train(settings, on_step=lambda step, _loss, tell=on_progress: tell(step)))


if __name__ == "__main__":
    typer.run(main)
