"""Facts of the playgrounds, read from their files: tests that use them hold for any small world."""

import json
from functools import cache
from typing import Any

from safetensors import safe_open

from lora_compose.compose.playground.assets import (
    PLAYGROUND,
    playground_lora,
    playground_loras,
    playground_model,
)

Box = tuple[int, int, int, int]


@cache
def metadata(name: str, model: str = PLAYGROUND) -> dict[str, str]:
    """The metadata of a LoRA."""
    with safe_open(playground_lora(name, model), "pt") as file:
        return file.metadata()


def words(name: str, model: str = PLAYGROUND) -> tuple[str, str]:
    """Trigger and class word of a LoRA."""
    found = metadata(name, model)
    return found["trigger"], found["class_word"]


def concepts(model: str = PLAYGROUND) -> list[str]:
    """Names of the concepts, each of which has an ordinary LoRA."""
    return [name for name in playground_loras(model) if not name.endswith("-tara")]


def _read(name: str, model: str = PLAYGROUND) -> Any:
    return json.loads((playground_model(model) / name).read_text(encoding="utf-8"))


def _side() -> int:
    unet, vae = (_read(f"{part}/config.json") for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


SIZE = _side()
"""Width and height of images in pixels."""
HALF = SIZE // 2
LEFT, RIGHT = (0, 0, HALF, SIZE), (HALF, 0, SIZE, SIZE)
SCHEDULER = _read("model_index.json")["scheduler"][1]
"""The class of the scheduler that comes with the UNet."""
(STYLE,) = (name for name in concepts() if words(name)[1] == "style")
"""The concept that is a style."""
STYLE_WORDS = " ".join(words(STYLE))
