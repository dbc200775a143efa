"""Attention that is steered: its maps are recorded, cells read the text of their region, or are drawn to words.

It acts on the `forward` of the modules that run attention, and there as an override of ComfyUI's attention function,
on top of one that another node has set.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import RegionAttention, Site, grid_at
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.kernels import Kernel
from lora_compose.compose.comfyui.composition import Composition

OVERRIDE = "optimized_attention_override"


@dataclass
class Steering:
    """What the attention layers of a model read during a pass, beside what other layers read.

    Attributes:
        state: That of the layers.
        plan: What acts where.
        joint: Whether text and image are in one sequence.
        ours: True for rows of our conditioning. Shape: [rows].
    """

    state: ForwardState
    plan: Composition
    joint: bool
    ours: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class SteeredAttention:
    """The `forward` of a module that runs one attention.

    Attributes:
        found: The `forward` that was there.
    """

    name: str
    site: Site
    steering: Steering
    found: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's output, with its attention steered; cells that have read several texts get the mean."""
        given = options.get("transformer_options") or {}
        override = partial(self._attend, given.get(OVERRIDE))
        out = self.found(*arguments, **{**options, "transformer_options": {**given, OVERRIDE: override}})
        regions = self.steering.state.inputs.regions
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
        state, site = self.steering.state, self.site
        cells = prod(grid_at(state.inputs.latent_grid, site.level))
        tokens = site.padded(max(state.inputs.lengths))
        lengths = {"text": tokens, "image": site.padded(cells)}
        if q.shape[2] != sum(lengths[part] for part in site.parts):
            raise ValueError("another node changes the cells that attention sees; take it out, or use no draft here")
        scale, joint = q.shape[-1] ** -0.5, self.steering.joint
        if joint:
            for recorder in state.recorders if site.joint else ():
                recorder.take(self.name, q[:, :, tokens : tokens + cells], k, scale, tokens=tokens)
            if state.inputs.joint_regions is None:
                return kernel(q, k, v)
        elif state.inputs.regions is None:
            return state.attend(kernel, self.name, site.level, q, k, v, scale, site.reads_text)
        run, ours = self._joint if joint else self._cells, self.steering.ours.to(q.device)
        parts = [(mine, rows) for mine, rows in ((True, ours), (False, ~ours)) if rows.any()]
        if len(parts) == 1:
            return run(kernel, parts[0][0], q, k, v)
        out = None
        for mine, rows in parts:  # ComfyUI may have them in any order
            part = run(kernel, mine, q[rows], k[rows], v[rows])
            out = part.new_empty(len(ours), *part.shape[1:]) if out is None else out
            out[rows] = part
        assert out is not None
        return out

    def _cells(self, kernel: Kernel, mine: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a UNet. Rows of others read their own text in every region, and see everything."""
        regions, lengths = self.steering.state.inputs.regions, self.steering.plan.lengths
        assert isinstance(regions, RegionAttention)
        assert lengths is not None
        if not self.site.reads_text:
            return regions.self_attention(kernel, self.site.level, q, k, v) if mine else kernel(q, k, v)
        if not mine:
            return regions.cross(kernel, self.site.level, q, [k] * len(lengths), [v] * len(lengths))
        # ComfyUI repeats texts to the length of others.
        keys, values = (x[:, :, : sum(lengths)].split(list(lengths), dim=2) for x in (k, v))
        return regions.cross(kernel, self.site.level, q, keys, values)

    def _joint(self, kernel: Kernel, mine: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a transformer; `JointRegions` has positions before heads."""
        regions = self.steering.state.inputs.joint_regions
        if not mine or regions is None:
            return kernel(q, k, v)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return regions.attend(attend, self.site.parts, q, k, v, None).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class EachTextFromItsStart:
    """The `forward` of a module that turns positions into rotary embeddings, where several texts are in one sequence.

    ComfyUI counts through the whole sequence: the text of a region would stand behind that of the image.
    """

    steering: Steering
    found: Callable[[Tensor], Tensor]

    def __call__(self, ids: Tensor) -> Tensor:
        """Rotary embeddings. Shape of the positions: [rows, tokens and cells, dimensions]."""
        regions = self.steering.state.inputs.joint_regions
        if regions is None or regions.positions is None:
            return self.found(ids)
        moved = torch.cat([ids[:, regions.positions], ids[:, len(regions.positions) :]], dim=1)
        return self.found(torch.where(self.steering.ours.to(ids.device)[:, None, None], moved, ids))
