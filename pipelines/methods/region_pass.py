"""The pass of regions that each read a text of their own, and its gates: every LoRA acts in its region."""

from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import Gates, Partition, RegionAttention
from lora_compose.attention.device import to_device
from lora_compose.attention.regions import queries_of
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import ActingRows, acting_rows
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.scene.regions import Regions, Window
from lora_compose.pipelines.text.conditioning import Conditioning

Inject = Literal["attn2", "full", "off"]
"""Where a LoRA acts in its region: on keys, values and output of cross-attention, in every layer, or nowhere."""


def region_pass(
    session: Session,
    texts: Conditioning,
    regions: Regions,
    window: Window | None = None,
    *,
    isolate: bool,
    rows: ActingRows = "cond_only",
    inject: Inject = "full",
    image: int | None = None,
) -> Pass:
    """The pass in which cells of region n read text 1 + n, and others text 0.

    Args:
        texts: Text 0 for the background, text 1 + n for region n.
        regions: On all grids, or on those of a window.
        window: The part of the canvas that is denoised; None is all of it.
        isolate: Whether the cells of a region see no other region in self-attention.
        rows: Where LoRAs act under guidance.
        inject: Where they act in their regions.
        image: Index of the image, if each image has its own regions.
    """
    cells = {level: cells.flatten(0, 1) for level, cells in regions.cells.items()}
    partitions = {level: Partition.of(inside, session.canvas.device) for level, inside in cells.items()}
    attention = RegionAttention(partitions, inject != "off", isolate)
    return Pass(texts, _gates(session, texts, regions, rows, inject), attention, window, image)


def _gates(session: Session, texts: Conditioning, regions: Regions, rows: ActingRows, inject: Inject) -> Gates:
    """Region n's LoRA on text 1 + n and on the cells of the region, the others on text 0 and everywhere.

    Styles act on all texts and all cells.

    Time layers have no grid; a LoRA acts there if its region is not empty. Where regions overlap, their LoRAs act in
    equal parts, and the output of each region query is projected with the LoRA of its text.
    """
    weights, concepts = torch.tensor(session.concepts.weights), len(session.concepts.loaded)
    acting = acting_rows(texts, rows)
    owners = list(regions.indices)
    background = torch.ones(concepts).index_fill(0, torch.tensor(owners), 0)
    styles = torch.tensor([float(concept.is_style) for concept in session.concepts.concepts])
    of_text = torch.stack([background, *(torch.eye(concepts)[owners] + styles)])
    everywhere = torch.ones(concepts) if inject == "full" else background
    here = background.index_copy(0, torch.tensor(owners), regions.cells[0].flatten(0, 1).any(dim=0).float())
    image, read = {}, {}
    for level, cells in regions.cells.items():
        inside = regions.shares(level, concepts)
        image[level] = (inside + background) * everywhere
        read[level] = of_text[queries_of(cells.flatten(0, 1))[0]]
    if inject == "off":
        of_text, read = background.expand(1 + len(owners), -1), image

    def on_device(gate: Tensor) -> Tensor:
        return to_device(acting * gate * weights, session.canvas.device)

    return Gates(
        text=on_device(of_text[:, None, None]),
        image={level: on_device(gate) for level, gate in image.items()},
        row=on_device(everywhere * here)[:, 0],
        latent_grid=regions.grid,
        read={level: on_device(gate) for level, gate in read.items()},
        several_texts=True,
    )
