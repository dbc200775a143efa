"""What nodes show: a draft as images, files and merges in words."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_compose.attention.masks import cells_of
from lora_compose.compose.comfyui.composition import Found
from lora_compose.compose.figures.overlay import division, draft_heat
from lora_compose.compose.lora.file_inspection import about, by_itself
from lora_compose.compose.lora.merging import Report
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.scene.regions import HALF

_CELL = 8
"""Pixels of a cell of the latents, as most VAEs have it."""


def previewed(draft: Found) -> tuple[Tensor, Tensor]:
    """A draft as images [images, height, width, 3], and all regions as masks [concepts, height, width]."""
    height, width = (side * _CELL for side in draft.cells.shape[2:])
    subjects = [i for i, cells in enumerate(draft.cells[0]) if not cells.all()]
    looked_for = [i for i in subjects if draft.maps[0, i].any()]
    divided = division((width, height), draft.maps, cells_of(draft.cells, HALF), subjects)
    ground = Image.new("RGB", divided.size)
    shown = [divided, *(draft_heat(ground, draft.maps, i) for i in looked_for)]
    masks = torch.nn.functional.interpolate(draft.cells[:1].float(), scale_factor=_CELL, mode="nearest")[0]
    return torch.stack([torch.from_numpy(np.array(image)) for image in shown]) / 255, masks


def text_about(file: LoraFile) -> str:
    """What a LoRA file is and changes, line by line."""
    file_report = by_itself(about(file), file)
    lines = [*file_report.rows]
    lines += [
        (f"{block.part} {block.name}", f"{block.layers} layers, rank {block.rank}, alpha {block.alpha}")
        for block in file_report.blocks
    ]
    lines += [("no key of an adapter", key) for key in file_report.unmatched[:5]]
    lines += [] if file_report.problem is None else [("problem", file_report.problem)]
    return "\n".join(f"{label}: {said}" for label, said in lines)


def merged_text(report: Report) -> str:
    """A merge, line by line: how much of each file is in the result."""
    whole = report.blocks[-1]
    lines = [f"{report.out}: {whole.layers} layers, {report.size / 2**20:.1f} MiB"]
    for (source, weight), kept in zip(report.files, whole.kept, strict=True):
        lines.append(f"{source}, weight {weight:g}: " + ("changes nothing" if kept is None else f"kept {kept:.1%}"))
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
