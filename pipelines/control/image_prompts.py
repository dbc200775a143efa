"""Images that IP-Adapters read beside the text, made ready for a call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_compose.attention.sites import Grid
from lora_compose.pipelines.control.prepared import View
from lora_compose.pipelines.text.conditioning import Conditioning


class ReadsImages(Protocol):
    """A pipeline of a UNet that may have IP-Adapters."""

    unet: Any
    image_encoder: Any
    prepare_ip_adapter_image_embeds: Any
    vae_scale_factor: int

    @property
    def runs_on(self) -> torch.device:
        """The device on which the UNet runs."""
        ...


@dataclass(frozen=True, eq=False)
class PreparedImagePrompts:
    """The images of all IP-Adapters of a model.

    Attributes:
        positive: For conditional rows, by adapter. Shape: [images of the batch or 1, images, ...] each.
        negative: For unconditional rows; empty without guidance.
        masks: Where the images act, by adapter; None is everywhere. Shape: [1, images, height, width] each.
        latent_grid: Height and width of the latents.
    """

    positive: Sequence[Tensor]
    negative: Sequence[Tensor]
    masks: Sequence[Tensor] | None
    latent_grid: Grid

    def acts(self, step: int, steps: int) -> bool:
        """True: image prompts act in every step."""
        return True

    @property
    def for_any_part(self) -> bool:
        """Whether the image prompts are the same for all images and all parts of them."""
        return self.masks is None and all(len(embeds) == 1 for embeds in self.positive)

    def of_images(self, images: Sequence[int]) -> "PreparedImagePrompts":
        """The image prompts of some images of the batch."""
        positive, negative = (
            [e if len(e) == 1 else e[images] for e in embeds] for embeds in (self.positive, self.negative)
        )
        return replace(self, positive=positive, negative=negative)

    def inputs(self, text: Conditioning, view: View) -> Mapping[str, Any]:
        """Arguments of the model for one pass."""
        embeds: list[Tensor] = []
        for index, positive in enumerate(self.positive):
            branches = [conditional for _, conditional in text.roles.branches]
            by_branch = [view.of_images(positive if conditional else self.negative[index]) for conditional in branches]
            embeds.append(torch.cat([embed.expand(text.images, *embed.shape[1:]) for embed in by_branch]))
        masks = None if self.masks is None else [self._seen(mask, view) for mask in self.masks]
        return {"image_embeds": embeds, "ip_adapter_masks": masks}

    def _seen(self, mask: Tensor, view: View) -> Tensor:
        if view.window is None:
            return mask
        return view.of_cells(interpolate(mask.float(), self.latent_grid, mode="area"), 0)


def prepare_image_prompts(
    pipe: ReadsImages,
    image: Any,
    embeds: Sequence[Tensor] | None,
    masks: Any,
    *,
    guided: bool,
    images: int,
    size: tuple[int, int],
) -> PreparedImagePrompts | None:
    """The images of a call for IP-Adapters, as diffusers takes them; None for a model without one.

    `size` is width and height of the canvas in pixels. Raises ValueError if images and adapters do not go together.
    """
    there = pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
    has_image = image is not None or embeds is not None
    if not there and (has_image or masks is not None):
        raise ValueError("ip_adapter_image needs an IP-Adapter in the model: call pipe.load_ip_adapter(...) first")
    if there and not has_image:
        raise ValueError(
            "the model has an IP-Adapter, which needs an image: give ip_adapter_image=..., or call "
            "pipe.unload_ip_adapter()"
        )
    if not there:
        return None
    if image is not None and embeds is not None:
        raise ValueError("give ip_adapter_image or ip_adapter_image_embeds, one of the two")
    adapters = len(pipe.unet.encoder_hid_proj.image_projection_layers)
    for name, value in (("ip_adapter_image", image), ("ip_adapter_image_embeds", embeds), ("ip_adapter_masks", masks)):
        count = 1 if isinstance(value, Tensor) or not isinstance(value, list | tuple) else len(value)
        if value is not None and count != adapters:
            raise ValueError(f"{name} has {count} entries; the model has {adapters} IP-Adapters, which need one each")
    if image is not None and pipe.image_encoder is None:
        raise ValueError(
            "ip_adapter_image needs the image encoder of the IP-Adapter, which was not loaded; load it, or give "
            "ip_adapter_image_embeds"
        )
    pairs = pipe.prepare_ip_adapter_image_embeds(
        image, ip_adapter_image_embeds=embeds, device=pipe.runs_on, num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )  # fmt: skip
    halves = [value.chunk(2) if guided else (value[:0], value) for value in pairs]
    for _, positive in halves:
        if len(positive) not in (1, images):
            raise ValueError(
                f"ip_adapter_image_embeds are for {len(positive)} images, and the call makes {images}; give one for "
                "all, or one for each (with guidance, the negative ones first)"
            )
    read = None if masks is None else _masks(masks, [positive.shape[1] for _, positive in halves], pipe.runs_on)
    scale = pipe.vae_scale_factor
    negative = [half for half, _ in halves] if guided else []
    return PreparedImagePrompts([half for _, half in halves], negative, read, (size[1] // scale, size[0] // scale))


def _masks(masks: Any, images: Sequence[int], device: torch.device) -> list[Tensor]:
    """Masks of each adapter, in the form that diffusers' processors take."""
    by_adapter = [masks] if isinstance(masks, Tensor) else list(masks)
    for mask, count in zip(by_adapter, images, strict=True):
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[:2] != (1, count):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"each of ip_adapter_masks is a tensor [1, {count}, height, width] as IPAdapterMaskProcessor prepares "
                f"it, not {shape}"
            )
    return [mask.to(device) for mask in by_adapter]
