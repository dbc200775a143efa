"""Transformers that attend to text and image in one sequence: what their families have in common.

diffusers' processors share no signature, but end in one call, `dispatch_attention_fn` of queries, keys and values after
the rotary embedding. That call is replaced by ours, which adds recording and regions; everything that a processor does
before and after it stays diffusers' own.
"""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_compose.attention.backbones.processors import replace_processor
from lora_compose.attention.backbones.truncation import Kept, replace_children
from lora_compose.attention.claims import Journal, undoing
from lora_compose.attention.device import modules_of, uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_kernel import JointKernel
from lora_compose.attention.sites import Grid, Site, SitePart

PATCH = 2
"""Latent cells per image token and side, so that image tokens are on level 1."""


class JointBackbone:
    """Base class of transformers; a family adds a table of its layers and its forward pass.

    Args:
        reference: Whether it reads reference images beside the image.
        cells: Tokens of all of them; None means that there is one, which is the image that a call starts from.

    Attributes:
        table: Sites by patterns of layer names. A LoRA cannot change a layer that no pattern matches.
        blocks: The blocks in the order in which they run; a truncated pass leaves out the last ones.
        attends: Parts of an attention layer's sequence, by the beginning of its name; all others are joint.
    """

    table: ClassVar[tuple[tuple[str, Site], ...]]
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attends: ClassVar[Sequence[tuple[str, tuple[SitePart, ...]]]] = ()
    same_input: Sequence[tuple[str, ...]] = ()
    levels = frozenset({1})
    map_level = 1
    text_layers = 1
    reads_regions = False
    has_group_norms = False
    unconditional_apart = False
    hides_padding = False

    def __init__(self, model: nn.Module, reference: bool = False, cells: int | None = None) -> None:
        self.model, self._reference, self._cells = model, reference, cells
        sites = _sites(self.table, tuple(modules_of(model)))
        self.sites = {name: site.with_references(cells) for name, site in sites.items()} if reference else sites

    @property
    def unread(self) -> Collection[str]:
        """No layers."""
        return ()

    @property
    def map_layers(self) -> tuple[str, ...]:
        """Attention layers that show where words are in the image.

        Those of all single-stream blocks, or the last third where all blocks are of one kind: image features have mixed
        with text there.
        """
        *_, last = (tuple(name for name in self.word_layers if name.startswith(f"{kind}.")) for kind in self.blocks)
        return last if len(self.blocks) > 1 else last[-max(1, len(last) // 3) :]

    @property
    def word_layers(self) -> tuple[str, ...]:
        """Attention to text and image in one sequence, in all blocks."""
        apart = tuple(start for start, _ in self.attends)
        names = (name for name, _ in _attention(modules_of(self.model)) if name.startswith(self.blocks))
        return tuple(name for name in names if not (apart and name.startswith(apart)))

    @property
    def self_map_layers(self) -> tuple[str, ...]:
        """No layers: text and image are in one map."""
        return ()

    @property
    def native_side(self) -> int:
        """Side of the latents at the native resolution of 1024 pixels, in cells."""
        return 128

    def steer(self, modules: Mapping[str, nn.Module], state: ForwardState, undo: Journal) -> None:
        """Puts our kernel into every attention processor; `undo` puts them back.

        Fused projections are not used meanwhile: they are copies of the layers that have the LoRAs. Raises ValueError
        for processors that do not end in diffusers' attention dispatch.
        """
        layers = dict(_attention(modules))
        ours = {name: self._processor(name, attn.processor, state) for name, attn in layers.items()}
        for name, attn in layers.items():
            replace_processor(attn, ours[name], undo)
            if getattr(attn, "fused_projections", False):
                undo.callback(setattr, attn, "fused_projections", True)
                attn.fused_projections = False

    @contextmanager
    def truncated_after(self, layers: Iterable[str]) -> Iterator[None]:
        """Inside this block the transformer stops after the last block that holds one of some layers.

        The small final norm and projection still run; the output is meaningless.
        """
        model: Any = uncompiled(self.model)
        layers = tuple(layers)
        each = [(kind, i) for kind in self.blocks for i in range(len(getattr(model, kind)))]
        needed = [n for n, (kind, i) in enumerate(each, 1) if any(name.startswith(f"{kind}.{i}.") for name in layers)]
        kept = each[: max(needed, default=0)]
        whole = {kind: getattr(model, kind) for kind in self.blocks}
        cut = {
            kind: Kept((block for i, block in enumerate(blocks) if (kind, i) in kept), len(blocks))
            for kind, blocks in whole.items()
        }
        with undoing(model) as undo:
            replace_children(model, undo, **cut)
            yield

    @property
    def joint(self) -> Site | None:
        """How text and image lie in one sequence; None if they do not."""
        joint = next((site for _, site in self.table if site.joint), None)
        return joint.with_references(self._cells) if self._reference and joint is not None else joint

    @property
    def _kernel(self) -> "type[JointKernel]":
        """Our attention."""
        return JointKernel

    def _processor(self, layer: str, processor: Any, state: ForwardState) -> Any:
        """A processor for an attention layer, in place of the one found."""
        assert self.joint is not None, "families without joint sequences have processors of their own"
        parts = next((parts for start, parts in self.attends if layer.startswith(start)), self.joint.parts)
        return with_kernel(processor, self._kernel, layer, self.joint.with_parts(*parts), state)


def _attention(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    for name, module in modules.items():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            yield name, module


@lru_cache(maxsize=8)
def _sites(table: tuple[tuple[str, Site], ...], names: tuple[str, ...]) -> Mapping[str, Site]:
    """The sites by name of the layer, computed once for all models with these names."""
    sites = {name: site for pattern, site in table for name in names if re.fullmatch(pattern, name)}
    return MappingProxyType(sites)


def packed(latents: Tensor) -> Tensor:
    """Patches as tokens. Shape: [rows, channels, height, width] -> [rows, cells, 4 * channels]."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens back to latents of a height and width."""
    height, width = grid
    cells = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return nn.functional.pixel_shuffle(cells, PATCH)


def image_positions(latents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """0, row and column of every image token, for the rotary embedding. Shape: [cells, 3]."""
    height, width = (side // PATCH for side in latents.shape[-2:])
    to: dict[str, Any] = {"device": latents.device, "dtype": dtype or latents.dtype}
    rows, columns = torch.meshgrid(torch.arange(height, **to), torch.arange(width, **to), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def word_positions(text: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
    """Positions of a sequence's tokens; of several texts in one, each begins at 0. Shape: [tokens]."""
    if added is not None and "text_positions" in added:
        return added["text_positions"][-1]
    return torch.arange(text.shape[1], device=text.device)


def with_references(
    tokens: Tensor, positions: Tensor, references: Tensor, grids: Sequence[Grid], step: int
) -> tuple[Tensor, Tensor]:
    """Tokens and position ids of an image, and then those of reference images.

    Args:
        tokens: Shape: [rows, cells, channels].
        positions: Shape: [cells, ids].
        references: Tokens of all reference images, one after the other. Shape: [rows, cells, channels].
        grids: Height and width of each of them, in tokens.
        step: The first id of the n-th is so many times n; that of the image is 0.
    """
    each = [positions]
    for n, grid in enumerate(grids, 1):
        ids = positions.new_zeros(*grid, positions.shape[1])
        ids[..., 0] = step * n
        ids[..., 1] = torch.arange(grid[0], device=ids.device)[:, None]
        ids[..., 2] = torch.arange(grid[1], device=ids.device)
        each.append(ids.flatten(0, 1))
    return torch.cat([tokens, references.to(tokens.dtype)], dim=1), torch.cat(each)


def with_kernel(processor: Any, kernel: type[JointKernel], layer: str, site: Site, state: ForwardState) -> Any:
    """A copy of a processor that calls our kernel for diffusers' attention; ValueError if it does not call that."""
    kind = type(processor)
    call = kind.__call__
    if not isinstance(call, FunctionType) or "dispatch_attention_fn" not in call.__code__.co_names:
        raise ValueError(f"{layer} has a {kind.__name__}, which cannot be combined with concepts")
    names = dict(call.__globals__)
    names["dispatch_attention_fn"] = kernel(layer, site, state, names["dispatch_attention_fn"])
    del names["__name__"]  # torch.compile would look names up in the module of that name
    ours = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    made = copy.copy(processor)
    made.__class__ = type(f"Compose{kind.__name__}", (kind,), {"__call__": ours})
    return made
