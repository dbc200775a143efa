"""The output of a call with concepts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput


@dataclass
class Cost:
    """The cost of a call. The unit is a row: one latent of the whole canvas through the whole model.

    Attributes:
        rows_forward: Rows run forward to the end.
        rows_stopped: Rows run forward only to the last map layer; `lora-compose bench` counts their share of the FLOPs.
        rows_backward: Rows run backward.
        control_rows: Rows run forward through ControlNets, each of which counts; in passes with a gradient they are run
            backward as well.
        row_factor: FLOPs of a row, relative to one of the same prompt without reference images.
        preparation_seconds: From the start of the call to its first denoising step, by the host's clock: checking,
            encoding, installing, folding.
    """

    rows_forward: float = 0.0
    rows_stopped: float = 0.0
    rows_backward: float = 0.0
    control_rows: float = 0.0
    row_factor: float = 1.0
    preparation_seconds: float = 0.0

    @property
    def words(self) -> str:
        """The rows in words: "50", or "50 + 13 stopped + 13 backward"."""
        kinds = {"": self.rows_forward, " stopped": self.rows_stopped, " backward": self.rows_backward,
                 " of ControlNets": self.control_rows}  # fmt: skip
        return " + ".join(f"{rows:g}{kind}" for kind, rows in kinds.items() if rows or not kind)

    @property
    def each(self) -> str:
        """What a row costs, in words; empty without reference images."""
        return "" if self.row_factor == 1 else f", each {self.row_factor:.2f} times one without reference images"

    def add(self, other: "Cost") -> None:
        """Adds the rows of other passes."""
        self.rows_forward += other.rows_forward
        self.rows_stopped += other.rows_stopped
        self.rows_backward += other.rows_backward
        self.control_rows += other.control_rows


@dataclass
class ComposeOutput(StableDiffusionPipelineOutput):
    """Images and, if asked for, where each concept was.

    Attributes:
        cost: Counted rows.
        attention_maps: Attention to each concept's words on the map grid, fp32, mean over heads and layers.
            Shape: [recorded steps, images, concepts, height, width].
        masks: The mask of each concept: the method's own (`clora`), otherwise the cells where its map is above half of
            its maximum and above every other concept's share. Shape: as attention_maps, bool.
        draft_maps: The maps by which `draft` found the subjects, mean over the drafted steps, or those of the last one
            where text and image are one sequence; 0 for concepts that were not looked for. Shape: [images, concepts,
            height, width].
        recorded_steps: The steps that were recorded.
        method: Name of the method that ran.
        settings: Its settings that differ from the defaults.
        method_reason: The reason for the choice.
        origin: What `refine` needs of the call; None where the images cannot be repainted.
    """

    cost: Cost | None = None
    attention_maps: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    draft_maps: torch.Tensor | None = None
    recorded_steps: tuple[int, ...] | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    method_reason: str | None = None
    origin: Any = field(default=None, repr=False)

    def refine(self, how: Any = None, *, image: int = 0, **options: Any) -> Any:
        """Repaints each subject of an image alone, enlarged, with its LoRA (`refine`).

        Subjects are where their regions are, or where the masks of the middle step are, with `record_attention=True`.

        Args:
            how: A `Detailer`; None is its defaults.
            image: Which of the images.
            options: Of every call; steps, guidance and negative prompt are by default those of the image.

        Returns:
            A `Refined`: the image, the subjects, and the cost.

        Raises:
            ValueError: If the image cannot be repainted.
        """
        if self.origin is None:
            raise ValueError(
                "refine() repaints images that a model with inpainting made of a prompt with concepts, not of an "
                "image, nor with ip_adapter_masks, timesteps or sigmas; for your own images there is "
                "lora_compose.refine(pipe, image, ...)"
            )
        return self.origin.refine(self, image, how, options)
