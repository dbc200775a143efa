"""Gates of LoRAs that act in regions, each region reading a text of its own."""

from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import Gates
from lora_compose.attention.layers import sent
from lora_compose.attention.layout import read_by
from lora_compose.pipelines.conditioning import Conditioning
from lora_compose.pipelines.engine import Engine
from lora_compose.pipelines.regions import Regions

Inject = Literal["attn2", "full", "off"]
"""Where a LoRA acts in its region: on keys, values and output of cross-attention, in every layer, or nowhere."""

Rows = Literal["cond_only", "all"]
"""Where LoRAs act under guidance: on the prompt's rows, or on the negative prompt's as well."""


def region_gates(
    engine: Engine, texts: Conditioning, regions: Regions, *, rows: Rows = "cond_only", inject: Inject = "full"
) -> Gates:
    """Region n's LoRA on text 1 + n and on the cells of the region, the others on text 0 and everywhere.

    Styles act on all texts, on all cells and on all that cells read.

    Layers without cells (of the time) take part in all of a canvas: each LoRA acts there whose region has a cell on it.
    Where regions overlap, each of their LoRAs acts in equal parts, and what was read of a text is projected with the
    LoRA of that text.

    Args:
        engine: Knows the concepts and their weights.
        texts: Text 0 for the background, text 1 + n for region n.
        regions: On all grids.
        rows: Where LoRAs act under guidance.
        inject: Where they act in their regions.
    """
    weights, concepts = torch.tensor(engine.weights), len(engine.concepts)
    acting = torch.ones(texts.rows, 1, 1)
    if rows == "cond_only":
        acting[: texts.conditional_rows.start] = 0
    mine = list(regions.owners)
    background = torch.ones(concepts).index_fill(0, torch.tensor(mine), 0)
    styles = torch.tensor([float(concept.is_style) for concept in engine.concepts])
    of_text = torch.stack([background, *(torch.eye(concepts)[mine] + styles)])
    everywhere = torch.ones(concepts) if inject == "full" else background
    here = background.index_copy(0, torch.tensor(mine), regions.cells[0].flatten(0, 1).any(dim=0).float())
    image, read = {}, {}
    for level, cells in regions.cells.items():
        inside = regions.shares(level, concepts)
        image[level] = (inside + background) * everywhere
        read[level] = of_text[read_by(cells.flatten(0, 1))[0]]
    if inject == "off":
        of_text, read = background.expand(1 + len(mine), -1), image

    def on_device(gate: Tensor) -> Tensor:
        return sent(acting * gate * weights, engine.device)

    return Gates(
        text=on_device(of_text[:, None, None]),
        image={level: on_device(gate) for level, gate in image.items()},
        row=on_device(everywhere * here)[:, 0],
        latent_grid=regions.grid,
        read={level: on_device(gate) for level, gate in read.items()},
    )
