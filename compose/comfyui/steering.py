"""Attention that is steered: its maps are recorded, cells read the text of their region, or are drawn to words.

It acts on the `forward` of the modules that run attention, and there as an override of ComfyUI's attention function,
on top of one that another node has set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from lora_compose.attention import JointRegions, RegionAttention, Site, grid_at
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_regions import RowIndex
from lora_compose.attention.kernels import Kernel

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True, eq=False)
class OurRegions(RegionAttention):
    """Region attention of our conditioning's rows. Rows of others read their own text, and see all cells.

    Attributes:
        lengths: Tokens of each text that our conditioning has, one after the other.
        rows: Those of our conditioning, and those of others; None where there are none.
    """

    lengths: Sequence[int]
    rows: tuple[RowIndex | None, RowIndex | None]

    def attend(self, kernel: Kernel, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross- or self-attention. Shapes: [rows, heads, positions, channels]; of the result, region queries."""
        mine, others = self.rows
        if others is None:
            return self._ours(kernel, site, q, k, v)
        ours, theirs = self._ours(kernel, site, q[mine], k[mine], v[mine]), kernel(q[others], k[others], v[others])
        if site.reads_text:
            theirs = self.at_queries(site.level, theirs.transpose(1, 2)).transpose(1, 2)
        out = ours.new_empty(len(q), *ours.shape[1:])
        out[mine], out[others] = ours, theirs
        return out

    def _ours(self, kernel: Kernel, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not site.reads_text:
            return self.self_attention(kernel, site.level, q, k, v)
        # ComfyUI repeats texts to the length of others.
        keys, values = (x[:, :, : sum(self.lengths)].split([*self.lengths], dim=2) for x in (k, v))
        return self.cross(kernel, site.level, q, keys, values)


@dataclass(frozen=True, eq=False)
class SteeredAttention:
    """The `forward` of a module that runs one attention.

    Attributes:
        found: The `forward` that was there.
    """

    name: str
    site: Site
    state: ForwardState
    found: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's output, with its attention steered; cells that have read several texts get the mean."""
        given = options.get("transformer_options") or {}
        override = partial(self._attend, given.get(OVERRIDE))
        out = self.found(*arguments, **{**options, "transformer_options": {**given, OVERRIDE: override}})
        regions = self.state.inputs.regions
        if regions is None or not self.site.reads_text:
            return out
        return regions.mean_over_queries(self.site.level, out)

    def _attend(
        self, before: Any, core: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, *further: Any,
        skip_reshape: bool = False, skip_output_reshape: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        """ComfyUI's attention. Shapes: [rows, positions, heads * channels], or as `skip_reshape` says.

        Args:
            before: An override that was there.
            core: ComfyUI's own function; the rest are its arguments.
        """
        if mask is not None:
            raise ValueError("another node masks attention; it cannot be combined with a draft or texts of regions")
        run = core if before is None else partial(before, core)

        def kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            shapes = {"skip_reshape": True, "skip_output_reshape": True}
            return run(query, key, value, heads, bias, *further, **shapes, **options)

        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = self._steered(kernel, q, k, v)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def _steered(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of heads. Shapes: [rows, heads, positions, channels]."""
        site, inputs, scale = self.site, self.state.inputs, q.shape[-1] ** -0.5
        cells = prod(grid_at(inputs.latent_grid, site.level))
        tokens = site.padded(max(inputs.lengths))
        lengths = {"text": tokens, "image": site.padded(cells)}
        if q.shape[2] != sum(lengths[part] for part in site.parts):
            raise ValueError("another node changes the cells that attention sees; take it out, or use no draft here")
        if isinstance(inputs.regions, OurRegions):
            return inputs.regions.attend(kernel, site, q, k, v)
        if not site.joint and inputs.joint_regions is None:
            return self.state.attend(kernel, self.name, site.level, q, k, v, scale, site.reads_text)
        for recorder in self.state.recorders:
            recorder.take(self.name, q[:, :, tokens : tokens + cells], k, scale, tokens=tokens)
        return kernel(q, k, v) if inputs.joint_regions is None else self._joint(inputs.joint_regions, kernel, q, k, v)

    def _joint(self, regions: JointRegions, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to text and image in one sequence; `JointRegions` has positions before heads."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return regions.attend(attend, self.site.parts, q, k, v, None).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class EachTextFromItsStart:
    """The `forward` of a module that turns positions into rotary embeddings, where several texts are in one sequence.

    ComfyUI counts through the whole sequence: the text of a region would stand behind that of the image.
    """

    state: ForwardState
    found: Callable[[Tensor], Tensor]

    def __call__(self, ids: Tensor) -> Tensor:
        """Rotary embeddings. Shape of the positions: [rows, tokens and cells, dimensions]."""
        regions = self.state.inputs.joint_regions
        if regions is not None and regions.positions is not None:
            (_, ours), ids = regions.rows, ids.clone()
            ids[ours, : len(regions.positions)] = ids[ours][:, regions.positions]
        return self.found(ids)
