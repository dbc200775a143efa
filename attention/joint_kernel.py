"""Attention to text and image in one sequence, as bank layers and methods need it, around a model's own attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_regions import seen_too
from lora_compose.attention.sites import Site, grid_at


@dataclass(frozen=True)
class JointKernel:
    """A model's attention with recording of maps, with regions and with the bias of the text.

    Attributes:
        layer: The name of the layer.
        site: Its sequence.
        attend: The model's own attention of queries, keys and values, with a mask as its argument `attn_mask`:
            diffusers' `dispatch_attention_fn`, or what another program has.
    """

    layer: str
    site: Site
    state: ForwardState
    attend: Callable[..., Tensor]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attends. Shapes: [rows, positions, heads, channels]; masks as for `JointRegions.attend`."""
        if self.site.joint and self.state.recorders:
            self._record(query, key, attn_mask)
        out = self._attend(query, key, value, attn_mask, options)
        if self.site.joint:
            for recorder in self.state.recorders:
                recorder.take_output(self.layer, out[:, self._parts(key.shape[1])[1]].flatten(2))
        return out

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> Tensor:
        regions, bias = self.state.inputs.joint_regions, self.state.inputs.bias_factors

        channels, options = value.shape[-1], dict(options)
        if bias is not None and self.site.joint:
            text, image, _ = self._parts(key.shape[1])
            scale = options.get("scale") or query.shape[-1] ** -0.5
            more_query, more_key = bias.channels(self.site.level, key.shape[1], text, image, scale)
            query, key, options["scale"] = _extended(query, more_query), _extended(key, more_key), scale
            if "backend" in options:
                options["backend"] = "native"  # others may take no scale, or at most 128 channels
            # Fast kernels want values as wide as queries.
            value = nn.functional.pad(value, (0, more_key.shape[-1]))

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return self.attend(query, key, value, attn_mask=mask, **options)

        if regions is None:
            out = attend(query, key, value, mask)
        else:
            out = regions.attend(attend, self.site.parts, query, key, value, mask)
        return out[..., :channels]

    def _record(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        text, image, others = self._parts(key.shape[1])
        regions = self.state.inputs.joint_regions
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., image, :]
        if regions is not None:
            allowed = regions.allowed(self.site.parts, key.shape[1])[:, None, image]
            mask = allowed if mask is None else seen_too(mask, allowed)

        def text_first(x: Tensor, dim: int) -> Tensor:
            """The positions in the order of `token_weights`."""
            return torch.cat([x.narrow(dim, part.start, part.stop - part.start) for part in (text, *others)], dim=dim)

        keys, tokens, scale = text_first(key, 1).transpose(1, 2), text.stop - text.start, query.shape[-1] ** -0.5
        seen = None if mask is None else text_first(mask, -1)
        hides = seen is not None and seen.dtype == torch.bool
        allowed, bias = (seen, None) if hides else (None, seen)
        scores = (self.state.inputs.text_bias or {}).get(self.site.level)
        if scores is not None:
            scores = nn.functional.pad(scores[..., :tokens], (0, keys.shape[2] - min(tokens, scores.shape[-1])))
            bias = scores if bias is None else bias + scores
        for recorder in self.state.recorders:
            recorder.take(self.layer, query[:, image].transpose(1, 2), keys, scale, allowed, tokens, bias)

    def _parts(self, positions: int) -> tuple[slice, slice, Sequence[slice]]:
        """Slices of text, of image without what it is filled up with, and of all but the text in a joint sequence.

        The lengths of text and image are known; what else there is lies side by side, and has the rest. The model
        attends to what fills up the image, so that this counts among all but the text.
        """
        inputs, parts = self.state.inputs, self.site.parts
        cells = prod(grid_at(inputs.latent_grid, self.site.level))
        lengths = {"text": self.site.padded(max(inputs.lengths)), "image": self.site.padded(cells)}
        rest = positions - sum(lengths.values())
        slices, start = {}, 0
        for part in parts:
            length = lengths.get(part)
            if length is None:
                length, rest = rest, 0
            slices[part] = slice(start, start + length)
            start += length
        image = slice(slices["image"].start, slices["image"].start + cells)
        return slices["text"], image, [where for part, where in slices.items() if part != "text"]


def _extended(x: Tensor, channels: Tensor) -> Tensor:
    """Queries or keys [rows, positions, heads, channels] with extra channels [rows, positions, extra channels]."""
    return torch.cat([x, channels[:, :, None].to(x.dtype).expand(-1, -1, x.shape[2], -1)], dim=-1)
