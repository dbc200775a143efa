"""Pictures that say where things are: a ControlNet or a T2I-Adapter beside concepts.

With w for the scale of a control, or that of a region inside it, at step t of latents z and a text c:

    ControlNet:   what a skip connection or the middle of the UNet carries  <-  itself + w r_k(z, t, c, picture)
    T2I-Adapter:  what a block of the UNet's first half gives               <-  itself + w f_k(picture)

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543; Mou et al.,
"T2I-Adapter", arXiv 2302.08453. `docs/control.md` says how both go with concepts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from lora_compose.attention.backbones.unet import blocks
from lora_compose.attention.device import uncompiled
from lora_compose.attention.masks import Box
from lora_compose.attention.sites import coarser, grid_at
from lora_compose.pipelines.canvas import Canvas
from lora_compose.pipelines.conditioning import Conditioning
from lora_compose.pipelines.regions import Window, region_mask

Picture = Image.Image | Tensor
"""A picture, or numbers as the model reads them, mostly 0 to 1. Shape: [(pictures,) channels, height, width]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """A picture that says where things are, and the model that reads it.

    Attributes:
        model: diffusers' `ControlNetModel` or `T2IAdapter`, on the device of the pipeline.
        image: What it reads, as large as the canvas: one picture for all prompts, or one for each.
        scale: Factor on what it says; 0 switches it off.
        start: It acts from this part of the steps on.
        end: It acts until this part of the steps.
        regions: By name of a concept, the scale inside its region, instead of `scale`. Where regions overlap, the mean
            counts, and a cell of a coarse grid that a region covers partly has its part.
    """

    model: Any
    image: Picture | Sequence[Picture]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    regions: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(uncompiled(self.model), ControlNetModel | T2IAdapter):
            raise TypeError(
                f"the model of a control is a ControlNetModel or a T2IAdapter of diffusers, not a "
                f"{type(self.model).__name__}; several make several controls: control=[Control(...), Control(...)]"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"a control acts between two parts of the steps, 0 <= start < end <= 1, not from {self.start} to "
                f"{self.end}"
            )
        for scale in (self.scale, *self.regions.values()):
            if not math.isfinite(scale):
                raise ValueError(f"the scale of a control must be a finite number, not {scale}")

    @property
    def is_off(self) -> bool:
        """Whether it says nothing anywhere."""
        return not any((self.scale, *self.regions.values()))

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, by diffusers' rule: if all of the step lies between start and end."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


def controls_of(control: "Control | Sequence[Control] | None") -> tuple[Control, ...]:
    """The controls of a call as a tuple.

    Raises:
        TypeError: For anything that is no `Control`.
    """
    several = isinstance(control, list | tuple)
    given: tuple[Any, ...] = () if control is None else tuple(control) if several else (control,)
    for one in given:
        if not isinstance(one, Control):
            raise TypeError(
                f"control takes a Control(model=..., image=...) or a list of them, not a {type(one).__name__}"
            )
    return given


@dataclass(frozen=True, eq=False)
class View:
    """What a pass sees.

    Attributes:
        window: Which rows and columns of the latents; None is the whole canvas.
        image: Which image of the batch; None is all.
    """

    window: Window | None = None
    image: int | None = None

    def of_cells(self, cells: Tensor, level: int) -> Tensor:
        """What it sees of a grid of all images. Shape: [images or 1, channels, height, width]."""
        rows, columns = (slice(None), slice(None)) if self.window is None else self.window
        if self.window is not None:
            rows, columns = coarser(rows, level), coarser(columns, level)
        return self.of_images(cells)[..., rows, columns]

    def of_pixels(self, pixels: Tensor, scale: int) -> Tensor:
        """The same of pictures, with so many pixels for a latent cell and side."""
        if self.window is None:
            return self.of_images(pixels)
        rows, columns = (slice(part.start * scale, part.stop * scale) for part in self.window)
        return self.of_images(pixels)[..., rows, columns]

    def of_images(self, batch: Tensor) -> Tensor:
        """What it sees of something that every image has, or all have together."""
        return batch if self.image is None or len(batch) == 1 else batch[self.image : self.image + 1]


@dataclass(frozen=True, eq=False)
class PreparedControlNet:
    """A ControlNet made ready for a call.

    Attributes:
        control: What was given.
        hint: The picture of every image, as the model reads it. Shape: [images, channels, height, width].
        pixels: How many of them a latent cell has by side.
        levels: The level of every residual, those of the skip connections first.
        weights: Its scale by level, where regions have others. Shape: [images or 1, 1, height, width]; None is the
            same everywhere.
    """

    control: Control
    hint: Tensor
    pixels: int
    levels: Sequence[int]
    weights: Mapping[int, Tensor] | None

    def of_images(self, images: Sequence[int]) -> "PreparedControlNet":
        """The same for some of the images."""
        return replace(self, hint=self.hint[images], weights=_of_images(self.weights, images))

    def first_row(self, text: Conditioning) -> int:
        """From which row on it runs a pass: the prompt's alone if it was made for that (`global_pool_conditions`)."""
        model: Any = uncompiled(self.control.model)
        return text.conditional_rows.start if model.config.global_pool_conditions else 0

    def residuals(self, latents: Tensor, t: Tensor, text: Conditioning, view: View) -> list[Tensor]:
        """What it adds to the skip connections and, last, to the middle. Shape: [rows, channels, height, width] each.

        Args:
            latents: As the UNet gets them. Shape: [rows, channels, height, width].
            t: The timestep.
            text: The text of all rows.
            view: What the pass sees.
        """
        model, first, dtype = self.control.model, self.first_row(text), self.hint.dtype
        mine = text.select(slice(first, text.rows))
        skips, mid = model(
            latents[first:].to(dtype),
            t,
            encoder_hidden_states=_one_text(mine.canvas_text, model.config.cross_attention_dim).to(dtype),
            controlnet_cond=repeated(view.of_pixels(self.hint, self.pixels), mine.rows),
            added_cond_kwargs=None if mine.added is None else dict(mine.added),
            return_dict=False,
        )
        given = zip((*skips, mid), self.levels, strict=True)
        found = [self._weighed(residual, level, view).to(latents.dtype) for residual, level in given]
        return [torch.cat([one.new_zeros(first, *one.shape[1:]), one]) for one in found] if first else found

    def _weighed(self, residual: Tensor, level: int, view: View) -> Tensor:
        scale = _scale(self.control, self.weights, level, view)
        return residual * (repeated(scale, len(residual)).to(residual.dtype) if isinstance(scale, Tensor) else scale)


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """A T2I-Adapter made ready for a call: it reads each part of the canvas that is run once.

    Attributes:
        control: What was given.
        hint: The picture of every image, as the model reads it. Shape: [images, channels, height, width].
        pixels: How many of them a latent cell has by side.
        places: Channels and level of the places in the UNet that take features, in order.
        weights: As for a ControlNet.
        dtype: Of the UNet.
    """

    control: Control
    hint: Tensor
    pixels: int
    places: Sequence[tuple[int, int]]
    weights: Mapping[int, Tensor] | None
    dtype: torch.dtype
    _read: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def of_images(self, images: Sequence[int]) -> "PreparedAdapter":
        """The same for some of the images."""
        return replace(self, hint=self.hint[images], weights=_of_images(self.weights, images), _read={})

    def residuals(self, rows: int, view: View) -> list[Tensor]:
        """What it adds to the blocks of the UNet's first half. Shape: [rows, channels, height, width] each."""
        return [repeated(view.of_images(feature), rows) for feature in self.features(view.window)]

    def features(self, window: Window | None = None) -> list[Tensor]:
        """What it says about a part of the canvas, scales included. Shape: [images, channels, height, width] each."""
        key = () if window is None else tuple(edge for part in window for edge in (part.start, part.stop))
        if key not in self._read:
            with torch.no_grad():
                self._read[key] = self._features(View(window))
        return self._read[key]

    def _features(self, view: View) -> list[Tensor]:
        hint = view.of_pixels(self.hint, self.pixels)
        found: list[Tensor] = self.control.model(hint)
        cells = hint.shape[2] // self.pixels, hint.shape[3] // self.pixels
        taken = [(channels, *grid_at(cells, level)) for channels, level in self.places][: len(found)]
        if (given := [tuple(feature.shape[1:]) for feature in found]) != taken:
            raise ValueError(
                f"this T2I-Adapter is for another model: it gives features of {given}, and the UNet takes {taken} "
                "(channels, height, width); expected one that was made for this family (Stable Diffusion 1.x, 2.x or "
                "XL)"
            )
        scaled = zip(found, self.places, strict=False)  # the UNet's middle need not have one
        return [
            (feature * _scale(self.control, self.weights, level, view)).to(self.dtype) for feature, (_, level) in scaled
        ]


PreparedControl = PreparedControlNet | PreparedAdapter


def repeated(by_image: Tensor, rows: int) -> Tensor:
    """What every image has, for all rows of a pass, whose parts have one row per image each."""
    return torch.cat([by_image] * (rows // len(by_image))) if len(by_image) != rows else by_image


def denoiser_inputs(
    guides: Sequence[PreparedControl], latents: Tensor, t: Tensor, text: Conditioning, view: View
) -> Mapping[str, Any]:
    """What the UNet is given by all guides together, by the names of its arguments.

    Args: as for `PreparedControlNet.residuals`.
    """
    running = [guide for guide in guides if isinstance(guide, PreparedControlNet) and guide.first_row(text) < text.rows]
    nets = [guide.residuals(latents, t, text, view) for guide in running]
    adapters = [guide.residuals(text.rows, view) for guide in guides if isinstance(guide, PreparedAdapter)]
    found: dict[str, Any] = {}
    if nets:
        *found["down_block_additional_residuals"], found["mid_block_additional_residual"] = _summed(nets)
    if adapters:
        found["down_intrablock_additional_residuals"] = _summed(adapters)  # the UNet empties this list
    return found


def _scale(control: Control, weights: Mapping[int, Tensor] | None, level: int, view: View) -> Tensor | float:
    """A control's scale, by cell where regions have others. Shape: [images or 1, 1, height, width]."""
    return control.scale if weights is None else view.of_cells(weights[level], level)


def _of_images(weights: Mapping[int, Tensor] | None, images: Sequence[int]) -> Mapping[int, Tensor] | None:
    """Scales by cell of some images; those that have one for all keep it."""
    if weights is None:
        return None
    return {level: cells if len(cells) == 1 else cells[images] for level, cells in weights.items()}


def _summed(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    sums = []
    for together in zip_longest(*parts):
        first, *others = (one for one in together if one is not None)
        sums.append(sum(others, start=first))
    return sums


def _one_text(text: Tensor, width: int) -> Tensor:
    """A text for all layers of a ControlNet: the mean of those that the UNet's cross-attention layers have, if they do.

    Args:
        text: Shape: [rows, tokens, width], or [rows, tokens, layers * width].
        width: What the model reads.
    """
    if text.shape[-1] <= width or text.shape[-1] % width:
        return text
    return text.unflatten(-1, (-1, width)).mean(dim=-2)


RegionsByPrompt = Sequence[Mapping[str, Box | str | None]]
"""By prompt, the regions of its concepts by name."""


def prepare_control(control: Control, unet: nn.Module, canvas: Canvas, regions: RegionsByPrompt) -> PreparedControl:
    """Checks that a control fits model and call; a T2I-Adapter reads its image.

    Args:
        control: The control.
        unet: The denoiser.
        canvas: Sizes of the call.
        regions: By prompt, the regions of its concepts by name.

    Raises:
        ValueError: If it does not fit, before anything has been changed.
    """
    model: Any = uncompiled(control.model)
    kind = type(model).__name__
    if model.device.type != canvas.device.type and not hasattr(model, "_hf_hook"):
        raise ValueError(
            f"the {kind} is on {model.device}, the pipeline runs on {canvas.device}; move it there with "
            f"model.to({canvas.device.type!r})"
        )
    original: Any = uncompiled(unet)
    if not isinstance(original, UNet2DConditionModel):
        raise ValueError(f"controls work with Stable Diffusion 1.x, 2.x and XL, not with a {type(original).__name__}")
    if isinstance(model, ControlNetModel):
        return _net(control, model, original, canvas, regions)
    return _adapter(control, model, original, canvas, regions)


_SHARED = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
"""What a ControlNet's configuration must have in common with the UNet's."""


def _net(
    control: Control, model: Any, unet: UNet2DConditionModel, canvas: Canvas, regions: RegionsByPrompt
) -> PreparedControlNet:
    for key in _SHARED:
        theirs, ours = (_listed(config.get(key)) for config in (model.config, unet.config))
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"this ControlNet is for another model: its {key} is {theirs}, the UNet's {ours}; expected one that "
                "was made for this family (Stable Diffusion 1.x, 2.x or XL)"
            )
    joined = 2 ** (len(model.config.conditioning_embedding_out_channels) - 1)
    if joined != canvas.pixels:
        raise ValueError(
            f"this ControlNet joins {joined} pixels of its picture by side, and the VAE of this model {canvas.pixels}"
        )
    if model.config.global_pool_conditions and control.regions:
        raise ValueError("this ControlNet says the same about the whole picture, so it can have no scale by region")
    hint = _hint(control.image, model.config.conditioning_channels, canvas)
    levels = tuple(_residual_levels(model))
    return PreparedControlNet(
        control,
        hint.to(canvas.device, model.dtype),
        canvas.pixels,
        levels,
        _weights(control, canvas, regions, frozenset(levels)),
    )


def _adapter(
    control: Control, model: Any, unet: UNet2DConditionModel, canvas: Canvas, regions: RegionsByPrompt
) -> PreparedAdapter:
    hint = _hint(control.image, model.config.in_channels, canvas)
    if any(side % model.downscale_factor for side in canvas.image_size):
        raise ValueError(
            f"this T2I-Adapter joins {model.downscale_factor} pixels by side, so width and height must be multiples of "
            f"{model.downscale_factor}, not {canvas.image_size[1]} x {canvas.image_size[0]}"
        )
    places = list(_feature_places(unet))
    weights = _weights(control, canvas, regions, frozenset(level for _, level in places))
    guide = PreparedAdapter(control, hint.to(canvas.device, model.dtype), canvas.pixels, places, weights, unet.dtype)
    guide.features()  # so that what does not fit is said now
    return guide


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _residual_levels(model: Any) -> Iterator[int]:
    """The level of everything that a ControlNet gives: after its first convolution and every layer, and the middle."""
    level = 0
    yield level
    for block in model.down_blocks:
        yield from [level] * len(block.resnets)
        if block.downsamplers is not None:
            level += 1
            yield level
    yield level


def _feature_places(unet: UNet2DConditionModel) -> Iterator[tuple[int, int]]:
    """Channels and level of where the UNet adds a T2I-Adapter's features, in order.

    Blocks with cross-attention take them before they halve the grid, others after it, and the middle one takes one that
    is left.
    """
    config: Any = unet.config
    channels = config["block_out_channels"]
    down = [(block, level) for _, block, stage, level in blocks(unet) if stage == "down"]
    for width, (block, level) in zip(channels, down, strict=True):
        halved = block.downsamplers is not None
        yield width, level + (halved and not getattr(block, "has_cross_attention", False))
    block, level = down[-1]
    yield channels[-1], level + (block.downsamplers is not None)


def _weights(
    control: Control, canvas: Canvas, regions: RegionsByPrompt, levels: frozenset[int]
) -> Mapping[int, Tensor] | None:
    """The scale of every cell, by level. Shape: [images or 1, 1, height, width]; None if it is the same everywhere.

    Raises:
        ValueError: For names that are no concept with a region.
    """
    if not control.regions:
        return None
    found = {name: region for mine in regions for name, region in mine.items() if region is not None}
    if unknown := control.regions.keys() - found.keys():
        raise ValueError(
            f"the regions of a control name {', '.join(map(repr, sorted(unknown)))}; concepts of this call that have a "
            f"region: {', '.join(map(repr, found)) or 'none'}"
        )
    by_prompt = torch.stack([_of_prompt(control, mine, canvas) for mine in regions])
    same = bool((by_prompt == by_prompt[0]).all())
    by_image = by_prompt[:1] if same else by_prompt.repeat_interleave(canvas.images_per_prompt, dim=0)
    return {level: _coarse(by_image[:, None], level).to(canvas.device) for level in levels}


def _of_prompt(control: Control, regions: Mapping[str, Box | str | None], canvas: Canvas) -> Tensor:
    """The scale of every latent cell for one prompt. Shape: [height, width]."""
    total, times = torch.zeros(canvas.latent_grid), torch.zeros(canvas.latent_grid)
    for name, scale in control.regions.items():
        if (region := regions.get(name)) is not None:
            covered = region_mask(region, canvas.image_size, canvas.latent_grid, sharp=True)
            total, times = total + scale * covered, times + covered
    return total / times.clamp(min=1) + control.scale * (1 - times).clamp(min=0)


def _coarse(cells: Tensor, level: int) -> Tensor:
    """The mean over the cells that the UNet's convolutions join."""
    return F.avg_pool2d(cells, 2**level, ceil_mode=True, count_include_pad=False) if level else cells


def _hint(image: Picture | Sequence[Picture], channels: int, canvas: Canvas) -> Tensor:
    """The picture of every image of a call. Shape: [images, channels, height, width], fp32.

    Raises:
        ValueError: For other sizes, channels and numbers of pictures.
        TypeError: For what is no picture.
    """
    given, prompts = image if isinstance(image, list | tuple) else [image], canvas.prompts
    pictures = [one for picture in given for one in _pixels(picture, channels)]
    if len(pictures) not in (1, prompts):
        raise ValueError(
            f"a control has one picture for all prompts, or one for each, and there are {len(pictures)} pictures and "
            f"{prompts} prompts"
        )
    for picture in pictures:
        if picture.shape[1:] != canvas.image_size:
            (height, width), size = canvas.image_size, picture.shape[1:]
            raise ValueError(
                f"the picture of a control has {size[1]} x {size[0]} pixels, the canvas {width} x {height}; resize the "
                "picture, or give the call its width and height"
            )
    by_prompt = torch.stack(pictures).expand(prompts, -1, -1, -1)
    return by_prompt.repeat_interleave(canvas.images_per_prompt, dim=0)


def _pixels(picture: Any, channels: int) -> Tensor:
    """One picture, or several of the same size. Shape: [pictures, channels, height, width], fp32, 0 to 1."""
    if isinstance(picture, Image.Image):
        picture = _of_image(picture, channels)
    elif not isinstance(picture, Tensor) or not picture.is_floating_point() or picture.dim() not in (3, 4):
        raise TypeError(
            "the picture of a control is a PIL image or a floating-point tensor of 0 to 1, [channels, height, width], "
            f"not {tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__}"
            f"{f' of {picture.dtype}' if isinstance(picture, Tensor) else ''}"
        )
    pixels = picture if picture.dim() == 4 else picture[None]
    if pixels.shape[1] != channels:
        raise ValueError(f"this control reads pictures of {channels} channels, and this one has {pixels.shape[1]}")
    return pixels.float().cpu()


def _of_image(picture: Image.Image, channels: int) -> Tensor:
    """A PIL image. Shape: [channels, height, width], fp32, 0 to 1."""
    if picture.mode[0] in "IF":
        raise ValueError(
            f"a picture of mode {picture.mode!r} has no fixed range; turn it into one of 8 bits, or into a tensor of "
            "0 to 1"
        )
    if channels == 1 and picture.mode not in ("1", "L"):
        raise ValueError(f"this control reads grey pictures, not {picture.mode}: give it picture.convert('L')")
    values = np.asarray(picture.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)
