"""IP-Adapters in a UNet: images that cross-attention reads beside the text, with keys and values of their own.

With q the queries of a layer, and for each adapter its scale s, images e and projections K', V':

    y = Attention(q, K(text), V(text)) + sum over adapters of  s Attention(q, K'(e), V'(e))

Ye et al., "IP-Adapter", arXiv 2308.06721. The projections and scales are those of diffusers' own processors.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from torch import Tensor

from lora_compose.attention.kernels import Kernel

PROCESSORS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
"""diffusers' attention processors of layers that read images."""


def read_images(
    processor: Any, kernel: Kernel, query: Tensor, images: Sequence[Tensor], masks: Sequence[Any] | None
) -> Iterator[Tensor]:
    """What a cross-attention layer reads of images, part by part, to be added to what it reads of the text.

    Args:
        processor: diffusers' processor of the layer; ordinary ones read no images.
        query: Shape: [rows, heads, cells, channels].
        images: The projected images of each adapter. Shape: [rows, images, tokens, channels] each.
        masks: For each adapter, where each of its images acts. Shape: [1, images, height, width] each; None is
            everywhere.

    Yields:
        Shape: [rows, cells, heads * channels].
    """
    if type(processor) not in PROCESSORS:
        return
    adapters = processor.scale, processor.to_k_ip, processor.to_v_ip
    masks = [None] * len(images) if masks is None else masks
    for given, scale, to_k, to_v, mask in zip(images, *adapters, masks, strict=True):
        scales: list[float] = scale if isinstance(scale, list) else [scale] * given.shape[1]
        if not any(scales):
            continue
        if mask is None:
            if len(set(scales)) > 1:
                raise ValueError(f"the images of an IP-Adapter have scales of their own, {scales}, but no masks")
            yield scales[0] * _attend(kernel, query, to_k(given).flatten(1, 2), to_v(given).flatten(1, 2))
            continue
        for index, image in enumerate(given.unbind(1)):
            read = _attend(kernel, query, to_k(image), to_v(image))
            inside = IPAdapterMaskProcessor.downsample(mask[:, index], len(read), *read.shape[1:])
            yield scales[index] * (read * inside.to(read))


def _attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = query.shape[1]
    key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (key, value))
    return kernel(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
