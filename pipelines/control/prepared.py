"""ControlNets and T2I-Adapters during a call: what they add to the model's arguments in each pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor

from lora_compose.attention.device import uncompiled
from lora_compose.attention.sites import coarser, grid_at
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.scene.regions import Window
from lora_compose.pipelines.scene.rows import Selection
from lora_compose.pipelines.text.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class View:
    """The part that a pass runs: a window of the latents, and the index of an image; None is all of either."""

    window: Window | None = None
    image: int | None = None

    def of_cells(self, cells: Tensor, level: int) -> Tensor:
        """The part of a grid that the view shows. Shape: [images or 1, channels, height, width]."""
        rows, columns = (slice(None), slice(None)) if self.window is None else self.window
        if self.window is not None:
            rows, columns = coarser(rows, level), coarser(columns, level)
        return self.of_images(cells)[..., rows, columns]

    def of_pixels(self, pixels: Tensor, scale: int) -> Tensor:
        """The part of control images that the view shows, with `scale` pixels per latent cell and side."""
        if self.window is None:
            return self.of_images(pixels)
        rows, columns = (slice(part.start * scale, part.stop * scale) for part in self.window)
        return self.of_images(pixels)[..., rows, columns]

    def of_images(self, batch: Tensor) -> Tensor:
        """The entries of the view's images; a single entry is for all."""
        return batch if self.image is None or len(batch) == 1 else batch[self.image : self.image + 1]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A control, prepared for a call.

    Attributes:
        hint: The control image of every image, as the model reads it. Shape: [images, channels, height, width].
        pixels: Pixels per latent cell and side.
        weights: Its scale by level, where regions have others. Shape: [images or 1, 1, height, width]; None is the
            same everywhere.
    """

    control: Control
    hint: Tensor
    pixels: int
    weights: Mapping[int, Tensor] | None

    def acts(self, step: int, steps: int) -> bool:
        """Whether the control acts in a step."""
        return self.control.acts(step, steps)

    def of_images(self, images: Sequence[int]) -> Self:
        """The control of some images of the batch; a single scale by cell is shared."""
        weights = self.weights and {
            level: cells if len(cells) == 1 else cells[images] for level, cells in self.weights.items()
        }
        return replace(self, hint=self.hint[images], weights=weights)

    def scale(self, level: int, view: View) -> Tensor | float:
        """The scale of the control, by cell where regions have others. Shape: [images or 1, 1, height, width]."""
        return self.control.scale if self.weights is None else view.of_cells(self.weights[level], level)


@dataclass(frozen=True, eq=False)
class PreparedControlNet(_Prepared):
    """A ControlNet, prepared for a call; `levels` are those of its residuals, the skip connections' first."""

    levels: Sequence[int]

    def read_by(self, text: Conditioning) -> Selection:
        """The rows that it runs; with `global_pool_conditions` they are the conditional ones only."""
        model: Any = uncompiled(self.control.model)
        return text.roles.conditional if model.config.global_pool_conditions else slice(None)

    def residuals(self, latents: Tensor, t: Tensor, text: Conditioning, view: View) -> list[Tensor]:
        """Residuals for the skip connections and, last, to the middle. Shape: [rows, channels, height, width] each.

        Args:
            latents: As the UNet gets them. Shape: [rows, channels, height, width].
        """
        model, rows, dtype = self.control.model, self.read_by(text), self.hint.dtype
        read = text.select(rows)
        skips, mid = model(
            latents[rows].to(dtype),
            t,
            encoder_hidden_states=_one_text(read.canvas_text, model.config.cross_attention_dim).to(dtype),
            controlnet_cond=repeated(view.of_pixels(self.hint, self.pixels), read.rows),
            added_cond_kwargs=None if read.added is None else dict(read.added),
            return_dict=False,
        )
        leveled = zip((*skips, mid), self.levels, strict=True)
        weighed = [self._weighed(residual, level, view).to(latents.dtype) for residual, level in leveled]
        return weighed if read.rows == text.rows else [_on_rows(residual, rows, text.rows) for residual in weighed]

    def _weighed(self, residual: Tensor, level: int, view: View) -> Tensor:
        scale = self.scale(level, view)
        return residual * (repeated(scale, len(residual)).to(residual.dtype) if isinstance(scale, Tensor) else scale)


@dataclass(frozen=True, eq=False)
class PreparedAdapter(_Prepared):
    """A T2I-Adapter made ready for a call: it reads each part of the canvas that is run once.

    Attributes:
        places: Channels and level of the places in the UNet that take features, in order.
        dtype: Of the UNet.
    """

    places: Sequence[tuple[int, int]]
    dtype: torch.dtype
    _read: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict, init=False)

    def residuals(self, rows: int, view: View) -> list[Tensor]:
        """Residuals for the blocks of the UNet's first half. Shape: [rows, channels, height, width] each."""
        return [repeated(view.of_images(feature), rows) for feature in self.features(view.window)]

    def features(self, window: Window | None = None) -> list[Tensor]:
        """Features for a part of the canvas, scales included. Shape: [images, channels, height, width] each."""
        key = () if window is None else tuple(edge for part in window for edge in (part.start, part.stop))
        if key not in self._read:
            with torch.no_grad():
                self._read[key] = self._features(View(window))
        return self._read[key]

    def _features(self, view: View) -> list[Tensor]:
        hint = view.of_pixels(self.hint, self.pixels)
        features: list[Tensor] = self.control.model(hint)
        cells = hint.shape[2] // self.pixels, hint.shape[3] // self.pixels
        taken = [(channels, *grid_at(cells, level)) for channels, level in self.places][: len(features)]
        if (shapes := [tuple(feature.shape[1:]) for feature in features]) != taken:
            raise ValueError(
                f"this T2I-Adapter is for another model: it gives features of {shapes}, and the UNet takes {taken} "
                "(channels, height, width); expected one that was made for this family (Stable Diffusion 1.x, 2.x or "
                "XL)"
            )
        scaled = zip(features, self.places, strict=False)  # the UNet's middle need not have one
        return [(feature * self.scale(level, view)).to(self.dtype) for feature, (_, level) in scaled]


def _on_rows(values: Tensor, rows: Selection, count: int) -> Tensor:
    """Values of some rows, and 0 on the others of so many."""
    on_all = values.new_zeros(count, *values.shape[1:])
    on_all[rows] = values
    return on_all


PreparedControl = PreparedControlNet | PreparedAdapter


def repeated(by_image: Tensor, rows: int) -> Tensor:
    """One entry per image, repeated for all rows of a pass; each branch has one row per image."""
    return torch.cat([by_image] * (rows // len(by_image))) if len(by_image) != rows else by_image


def model_inputs(
    controls: Sequence[PreparedControl], latents: Tensor, t: Tensor, text: Conditioning, view: View
) -> Mapping[str, Any]:
    """The sum of all controls as arguments of the UNet, by name. Args: as for `PreparedControlNet.residuals`."""
    running = [
        control
        for control in controls
        if isinstance(control, PreparedControlNet) and len(text.roles.select(control.read_by(text)))
    ]
    nets = [control.residuals(latents, t, text, view) for control in running]
    adapters = [control.residuals(text.rows, view) for control in controls if isinstance(control, PreparedAdapter)]
    arguments: dict[str, Any] = {}
    if nets:
        *arguments["down_block_additional_residuals"], arguments["mid_block_additional_residual"] = _summed(nets)
    if adapters:
        arguments["down_intrablock_additional_residuals"] = _summed(adapters)  # the UNet empties this list
    return arguments


def _summed(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    sums = []
    for together in zip_longest(*parts):
        first, *others = (values for values in together if values is not None)
        sums.append(sum(others, start=first))
    return sums


def _one_text(text: Tensor, width: int) -> Tensor:
    """A text for all layers of a ControlNet, [rows, tokens, width]: the mean of those that the UNet's layers have."""
    if text.shape[-1] <= width or text.shape[-1] % width:
        return text
    return text.unflatten(-1, (-1, width)).mean(dim=-2)
