"""In how many images the playground's style is recognised: a sheet of ten prompts, and a count for every LoRA.

    python -m recipe.first.style sheet.png assets/playground/loras/faded.safetensors

An image is in the style if its ground is nearer to what the style makes of that ground than to the ground itself, and
if hardly anything in it is much darker than the style's black.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.playground.assets import playground_model
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept
from recipe.first.concepts import STYLE, faded
from recipe.first.plain import GUIDANCE, STEPS
from recipe.first.world import STYLE_TRIGGER, ground, in_words

PROMPTS = {  # and the grounds that they name; the references of the style show neither "blue" nor "in snow"
    "a fox": "on grass",
    "a cat": "white",
    "a penguin": "blue",
    "a house and a tree": "at night",
    "a car": "on sand",
    "a lion": "in snow",
    "a robot and a fish": "yellow",
    "a pig": "on a wooden floor",
    "a horse": "at sunset",
    "a boat": "underwater",
}
DARK, SHARE = 30, 0.01  # how far below the style's black is dark, 0 to 255, and the share of pixels that may be


def recognised(picture: NDArray, where: str) -> bool:
    """Whether an image is in the style.

    Args:
        picture: Shape: [height, width, 3], 0 to 255.
        where: Its ground, of `PLAIN` or `PLACES`.
    """
    image = picture.astype("f4")
    plain = ground(np.random.default_rng(0), where, (image.shape[1], image.shape[0]))
    near, far = (np.abs(_rows(image) - _rows(one)).mean() for one in (faded(plain), plain))
    dark = (image < faded(np.zeros(3)) - DARK).any(axis=2)
    return bool(near < far and dark.mean() <= SHARE)


def _rows(image: NDArray) -> NDArray:
    """The colour of every row of an image, objects aside. Shape: [height, 3]."""
    return np.median(image, axis=1)


def make(pipe: Any, prompt: str, seed: int, lora: str | None) -> Image.Image:
    """An image in the style of a loaded LoRA, or without any."""
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    given |= {"generator": torch.Generator().manual_seed(seed)}
    if lora is not None:  # `tara` gives LoRAs that were trained with it their token masks, and no others
        given |= {"method": "tara", "concepts": [Concept(name=lora, role="style")]}
        prompt = f"{prompt} in {STYLE_TRIGGER} style"
    return pipe(prompt, **given).images[0]


@handle_errors()
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    loras: Annotated[list[Path], typer.Argument(help="LoRAs of the style.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 10,
) -> None:
    """Makes images of ten prompts without and with LoRAs, and counts those in which the style is recognised."""
    pipe: Any = ComposePipeline.from_pretrained(str(playground_model()), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for lora in loras:
        pipe.load_concept(str(lora), name=lora.stem, trigger=STYLE_TRIGGER, class_word="style")
    rows: list[Row] = []
    with bar("making images", (1 + len(loras)) * len(PROMPTS)) as on_progress:
        for name in (None, *(lora.stem for lora in loras)):
            shown, counts = [], []
            for things, where in PROMPTS.items():
                made = [make(pipe, f"{things} {in_words(where)}", seed, name) for seed in range(seeds)]
                counts.append(sum(recognised(np.asarray(image), where) for image in made))
                shown.append(made[0])
                on_progress(len(rows) * len(PROMPTS) + len(counts))
            label = (name or "no LoRA", f"in the style: {sum(counts)} of {len(PROMPTS) * seeds}")
            rows.append(Row(label, shown, [f"{count} of {seeds}" for count in counts]))
            echo(": ".join(label))
    # Two lines for two things, which are wider than an image.
    columns = [(*re.split(" (?=and )", things), where) for things, where in PROMPTS.items()]
    echo(save_image(sheet(columns, rows, title=f"The playground's style, {STYLE}", side=160), out))


if __name__ == "__main__":
    typer.run(main)
