"""Attention that is steered: its maps are recorded, cells read the text of their region, or are drawn to words.

It acts on the `forward` of the modules that run attention, and there as an override of ComfyUI's attention function,
on top of one that another node has set; with a bias, PyTorch's kernel takes the place of both. It is the only one known
to add a bias, and to take heads that are wider and have another scale than their own, as a joint sequence has with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from lora_compose.attention import Site, grid_at
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_kernel import JointKernel
from lora_compose.attention.kernels import Kernel, sdpa

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True, eq=False)
class SteeredAttention:
    """The `forward` of a module that runs one attention.

    Attributes:
        original: The `forward` that was there.
    """

    name: str
    site: Site
    state: ForwardState
    original: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's output, with its attention steered; cells that have read several texts get the mean."""
        given = options.get("transformer_options") or {}
        override = partial(self._attend, given.get(OVERRIDE))
        out = self.original(*arguments, **{**options, "transformer_options": {**given, OVERRIDE: override}})
        regions = self.state.inputs.regions
        if regions is None or not self.site.reads_text:
            return out
        return regions.mean_over_queries(self.site.level, out)

    def _attend(
        self, before: Any, core: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, *further: Any,
        skip_reshape: bool = False, skip_output_reshape: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        """ComfyUI's attention. Shapes: [rows, positions, heads * channels], or as `skip_reshape` says.

        `before` is an override that was there, `core` ComfyUI's own function; the rest are its arguments.
        """
        if mask is not None:
            raise ValueError("another node masks attention; it cannot be combined with a draft or texts of regions")
        run = core if before is None else partial(before, core)

        def kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            if bias is not None:
                # Some kernels, as SageAttention, drop it in silence, whether ComfyUI or another node has chosen them.
                return sdpa(query, key, value, bias)
            shapes = {"skip_reshape": True, "skip_output_reshape": True}
            return run(query, key, value, heads, None, *further, **shapes, **options)

        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = self._steered(kernel, q, k, v)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def _steered(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of heads. Shapes: [rows, heads, positions, channels]."""
        site, inputs = self.site, self.state.inputs
        cells = prod(grid_at(inputs.latent_grid, site.level))
        lengths = {"text": site.padded(max(inputs.lengths)), "image": site.padded(cells)}
        if q.shape[2] != sum(lengths[part] for part in site.parts):
            raise ValueError("another node changes the cells that attention sees; take it out, or use no draft here")
        if not site.joint and inputs.joint_regions is None:
            scale = q.shape[-1] ** -0.5
            return self.state.attend(kernel, self.name, site.level, q, k, v, scale, site.reads_text)

        def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None = None) -> Tensor:
            run = kernel if scale is None else partial(sdpa, scale=scale)  # with a bias
            return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask).transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # the joint kernel has positions before heads
        return JointKernel(self.name, site, self.state, attend)(q, k, v).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class EachTextFromItsStart:
    """The `forward` of a module that turns positions into rotary embeddings, where several texts are in one sequence.

    ComfyUI counts through the whole sequence: the text of a region would stand behind that of the image.
    """

    state: ForwardState
    original: Callable[[Tensor], Tensor]

    def __call__(self, ids: Tensor) -> Tensor:
        """Rotary embeddings. Shape of the positions: [rows, tokens and cells, dimensions]."""
        regions = self.state.inputs.joint_regions
        if regions is not None and regions.positions is not None:
            (_, ours), ids = regions.rows, ids.clone()
            ids[ours, : len(regions.positions)] = ids[ours][:, regions.positions]
        return self.original(ids)
