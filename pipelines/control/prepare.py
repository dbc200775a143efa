"""Checks that a control fits model and call, and gets it ready."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from lora_compose.attention.backbones.unet import blocks
from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.control.prepared import PreparedAdapter, PreparedControl, PreparedControlNet
from lora_compose.pipelines.control.spec import Control, ControlImage
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.scene.regions import region_mask
from lora_compose.pipelines.scene.scene import BoxOrMask

RegionsByPrompt = Sequence[Mapping[str, BoxOrMask | None]]
"""By prompt, the regions of its concepts by name."""


def prepare_control(control: Control, unet: nn.Module, canvas: Canvas, regions: RegionsByPrompt) -> PreparedControl:
    """Checks that a control fits model and call, or raises ValueError first; a T2I-Adapter reads its image.

    `regions` has, by prompt, the regions of its concepts by name.
    """
    model: Any = uncompiled(control.model)
    class_name = type(model).__name__
    if model.device.type != canvas.device.type and not hasattr(model, "_hf_hook"):
        raise ValueError(
            f"the {class_name} is on {model.device}, the pipeline runs on {canvas.device}; move it there with "
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
        raise ValueError(f"this ControlNet downsamples its image by {joined}; the VAE of this model by {canvas.pixels}")
    if model.config.global_pool_conditions and control.regions:
        raise ValueError("this ControlNet pools its output over the whole image, so it cannot have a scale per region")
    hint = _hint(control.image, model.config.conditioning_channels, canvas)
    levels = tuple(_residual_levels(model))
    weights = _weights(control, canvas, regions, frozenset(levels))
    return PreparedControlNet(control, hint.to(canvas.device, model.dtype), canvas.pixels, weights, levels)


def _adapter(
    control: Control, model: Any, unet: UNet2DConditionModel, canvas: Canvas, regions: RegionsByPrompt
) -> PreparedAdapter:
    hint = _hint(control.image, model.config.in_channels, canvas)
    if any(side % model.downscale_factor for side in canvas.image_size):
        raise ValueError(
            f"this T2I-Adapter downsamples by {model.downscale_factor}, so width and height must be multiples of "
            f"{model.downscale_factor}, not {canvas.image_size[1]} x {canvas.image_size[0]}"
        )
    places = list(_feature_places(unet))
    weights = _weights(control, canvas, regions, frozenset(level for _, level in places))
    prepared = PreparedAdapter(control, hint.to(canvas.device, model.dtype), canvas.pixels, weights, places, unet.dtype)
    prepared.features()  # so that errors are raised now
    return prepared


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _residual_levels(model: Any) -> Iterator[int]:
    """The level of each residual of a ControlNet: of its first convolution, its layers, and its mid block."""
    level = 0
    yield level
    for block in model.down_blocks:
        yield from [level] * len(block.resnets)
        if block.downsamplers is not None:
            level += 1
            yield level
    yield level


def _feature_places(unet: UNet2DConditionModel) -> Iterator[tuple[int, int]]:
    """Channels and level of each place where the UNet adds features of a T2I-Adapter, in order.

    Down blocks with cross-attention add them before they halve the grid, others after it; the mid block adds one that
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
    """By level, the scale of every cell, [images or 1, 1, height, width]; None if it is the same everywhere."""
    if not control.regions:
        return None
    known = {name: region for of_prompt in regions for name, region in of_prompt.items() if region is not None}
    if unknown := control.regions.keys() - known.keys():
        raise ValueError(
            f"the regions of a control name {', '.join(map(repr, sorted(unknown)))}; concepts of this call that have a "
            f"region: {', '.join(map(repr, known)) or 'none'}"
        )
    by_prompt = torch.stack([_of_prompt(control, of_prompt, canvas) for of_prompt in regions])
    same = bool((by_prompt == by_prompt[0]).all())
    by_image = by_prompt[:1] if same else by_prompt.repeat_interleave(canvas.images_per_prompt, dim=0)
    return {level: _coarse(by_image[:, None], level).to(canvas.device) for level in levels}


def _of_prompt(control: Control, regions: Mapping[str, BoxOrMask | None], canvas: Canvas) -> Tensor:
    """The scale of every latent cell for one prompt. Shape: [height, width]."""
    total, times = torch.zeros(canvas.latent_grid), torch.zeros(canvas.latent_grid)
    for name, scale in control.regions.items():
        if (region := regions.get(name)) is not None:
            covered = region_mask(region, canvas.image_size, canvas.latent_grid, sharp=True)
            total, times = total + scale * covered, times + covered
    return total / times.clamp(min=1) + control.scale * (1 - times).clamp(min=0)


def _coarse(cells: Tensor, level: int) -> Tensor:
    """The mean over the latent cells of each cell of a coarser grid."""
    return F.avg_pool2d(cells, 2**level, ceil_mode=True, count_include_pad=False) if level else cells


def _hint(source: ControlImage | Sequence[ControlImage], channels: int, canvas: Canvas) -> Tensor:
    """The control image of every image of a call, fp32. Shape: [images, channels, height, width]."""
    sources, prompts = source if isinstance(source, list | tuple) else [source], canvas.prompts
    images = [pixels for image in sources for pixels in _pixels(image, channels)]
    if len(images) not in (1, prompts):
        raise ValueError(
            f"a control has one image for all prompts, or one for each, and there are {len(images)} images and "
            f"{prompts} prompts"
        )
    for image in images:
        if image.shape[1:] != canvas.image_size:
            (height, width), size = canvas.image_size, image.shape[1:]
            raise ValueError(
                f"the image of a control has {size[1]} x {size[0]} pixels, the canvas {width} x {height}; resize the "
                "image, or give the call its width and height"
            )
    by_prompt = torch.stack(images).expand(prompts, -1, -1, -1)
    return by_prompt.repeat_interleave(canvas.images_per_prompt, dim=0)


def _pixels(image: Any, channels: int) -> Tensor:
    """One image, or several of the same size. Shape: [images, channels, height, width], fp32, 0 to 1."""
    if isinstance(image, Image.Image):
        image = _of_image(image, channels)
    elif not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() not in (3, 4):
        raise TypeError(
            "the image of a control is a PIL image or a floating-point tensor of 0 to 1, [channels, height, width], "
            f"not {tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__}"
            f"{f' of {image.dtype}' if isinstance(image, Tensor) else ''}"
        )
    pixels = image if image.dim() == 4 else image[None]
    if pixels.shape[1] != channels:
        raise ValueError(f"this control reads images of {channels} channels, and this one has {pixels.shape[1]}")
    return pixels.float().cpu()


def _of_image(image: Image.Image, channels: int) -> Tensor:
    """A PIL image. Shape: [channels, height, width], fp32, 0 to 1."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"an image of mode {image.mode!r} has no fixed range; convert it to 8 bits, or to a tensor of 0 to 1"
        )
    if channels == 1 and image.mode not in ("1", "L"):
        raise ValueError(f"this control reads grayscale images, not {image.mode}: give it image.convert('L')")
    values = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(image.height, image.width, -1)).permute(2, 0, 1)
