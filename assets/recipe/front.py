"""README's first picture: pairs of LoRAs alone, added up, and composed by `draft`, the first seeds, none left out.

python -m recipe.front docs/images/pair.png
python -m recipe.front docs/images/transformer-pair.png --model playground-flux
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image

from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.demo import GUIDANCE, STEPS, THREADS
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.playground.assets import PLAYGROUND, playground_lora, playground_model, playground_references
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.families import ComposePipeline

SIDE = 144


class Pair(NamedTuple):
    """Two subjects and where they are: "on grass"."""

    names: tuple[str, str]
    ground: str


PAIRS = (Pair(("cat", "dog"), "on grass"), Pair(("mira", "omar"), "in a room"))
ROWS = {"merge": "added up", "draft": "lora-compose"}
"""Methods, and what their rows are called."""


def rows(pipe: Any, pair: Pair, seeds: Iterable[int], steps: int, on_image: Callable[[], None]) -> list[Row]:
    """A row for each method: a reference of one subject, its LoRA alone, then both in one image by seed."""
    known = [loaded.concept for loaded in pipe.resolve_concepts(pair.names)]
    phrases = [f"{each.trigger} {each.class_word}" for each in known]
    prompt = f"{' and '.join(f'a {phrase}' for phrase in phrases)} {pair.ground}"

    def image(prompt: str, concepts: Sequence[str], method: str, seed: int) -> Image.Image:
        made = pipe(
            prompt, concepts=list(concepts), method=method, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed), **pipe.guided(GUIDANCE, None),
        ).images[0]  # fmt: skip
        on_image()
        return made

    found = []
    for number, (method, label) in enumerate(ROWS.items()):
        name = pair.names[number]
        with Image.open(playground_references(name)[0]) as reference:
            shown = [reference.convert("RGB"), image(f"a {phrases[number]} {pair.ground}", [name], "merge", 0)]
        shown += [image(prompt, pair.names, method, seed) for seed in seeds]
        found.append(Row((label,), shown, parted=number == 0))
    return found


def drawn(
    pairs: Sequence[Pair], seeds: int, steps: int, on_image: Callable[[], None] = lambda: None, model: str = PLAYGROUND
) -> Image.Image:
    """The sheet, made by one of the playgrounds."""
    pipe: Any = ComposePipeline.from_pretrained(playground_model(model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in dict.fromkeys(name for pair in pairs for name in pair.names):
        pipe.load_concept(playground_lora(name, model), name)
    columns = [("subject",), ("its LoRA alone",), *((f"both, seed {seed}",) for seed in range(seeds))]
    made = [row for pair in pairs for row in rows(pipe, pair, range(seeds), steps, on_image)]
    return sheet(columns, made, side=SIDE)


@handle_errors(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 5,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    model: Annotated[str, typer.Option(help="playground or playground-flux.")] = PLAYGROUND,
) -> None:
    """Makes the picture."""
    done, total = 0, len(PAIRS) * len(ROWS) * (1 + seeds)
    with bar("making images", total) as on_progress, threads(THREADS):

        def on_image() -> None:
            nonlocal done
            done += 1
            on_progress(done)

        echo(save_image(drawn(PAIRS, seeds, steps, on_image, model), out))


if __name__ == "__main__":
    typer.run(main)
