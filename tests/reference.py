"""Slow references for gated LoRA and for attention in regions.

Gated LoRA is written from its formula: y = W x + b + sum over concepts of gate_i * (D_i x).

D_i = scale * up @ down is dense, concepts are looped over, gates are full size, and everything happens in forward hooks
on a plain model. Which gate rules a layer follows from its name and from the shape of its actual output.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lora_compose.attention import Gates, Lora, LoraFactors
from lora_compose.pipelines.concepts.loading import Factors

Style = Literal["constant", "rows", "tokens", "pixels", "everything"]
STYLES: tuple[Style, ...] = ("constant", "rows", "tokens", "pixels", "everything")


@dataclass(frozen=True)
class FullGates:
    """Gates without broadcasting.

    Attributes:
        text: Shape: [rows, tokens, concepts].
        image: By height and width of a feature map. Shape: [rows, height, width, concepts].
        row: Shape: [rows, concepts].
    """

    text: Tensor
    image: Mapping[tuple[int, int], Tensor]
    row: Tensor

    def of_image(self, cells: int) -> Tensor:
        """The gate of the one grid with so many cells. Shape: [rows, cells, concepts]."""
        (found,) = [gate for (height, width), gate in self.image.items() if height * width == cells]
        return found.flatten(1, 2)


def random_gates(
    style: Style, *, rows: int, tokens: int, concepts: int, latent_grid: tuple[int, int], seed: int = 0, levels: int = 4
) -> tuple[Gates, FullGates]:
    """The same random gates twice: broadcast as far as the style allows, and full size for the reference."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, concepts, generator=generator) * 2.5 - 1

    gate_rows = rows if style in ("rows", "everything") else 1
    text = draw(gate_rows, tokens if style in ("tokens", "everything") else 1)
    row = draw(gate_rows)
    image, full = {}, {}
    for level in range(levels):
        height, width = (math.ceil(side / 2**level) for side in latent_grid)
        cells = height * width if style in ("pixels", "everything") else 1
        image[level] = draw(gate_rows, cells)
        full[height, width] = image[level].expand(rows, height * width, concepts).unflatten(1, (height, width))
    gates = Gates(text, image, row, latent_grid)
    return gates, FullGates(text.expand(rows, tokens, concepts), full, row.expand(rows, concepts))


def constant_gates(
    weights: Sequence[float],
    *,
    rows: int = 2,
    tokens: int = 7,
    latent_grid: tuple[int, int] = (16, 16),
    levels: int = 4,
) -> tuple[Gates, FullGates]:
    """Every concept has its weight everywhere; twice, as `random_gates`."""
    gate = torch.tensor(weights)
    gates = Gates(gate[None, None], dict.fromkeys(range(levels), gate[None, None]), gate[None], latent_grid)
    full = {}
    for level in range(levels):
        height, width = (math.ceil(side / 2**level) for side in latent_grid)
        full[height, width] = gate.expand(rows, height, width, -1)
    return gates, FullGates(gate.expand(rows, tokens, -1), full, gate.expand(rows, -1))


def dense(factors: LoraFactors) -> Tensor:
    """scale * up @ down in the shape of the layer's weight."""
    product = torch.einsum("or,r...->o...", factors.up.flatten(1), factors.down)
    return factors.scale * product


def deltas(factors: Factors) -> dict[str, Tensor]:
    """Dense changes by component and layer."""
    return {f"{part}.{name}": dense(found) for part, lora in factors.by_part.items() for name, found in lora.items()}


def with_reference(model: nn.Module, loras: Sequence[Lora], gates: FullGates) -> Callable[..., Any]:
    """A plain model that computes the gated sum of all LoRAs when it is called so, and only then."""
    hooks = _hooks(model, loras, gates)

    def call(*args: Any, **kwargs: Any) -> Any:
        handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
        try:
            return model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return call


def add_reference(model: nn.Module, loras: Sequence[Lora], gates: FullGates) -> None:
    """Makes a plain model compute the gated sum of all LoRAs from now on."""
    for name, hook in _hooks(model, loras, gates).items():
        model.get_submodule(name).register_forward_hook(hook)


def _hooks(model: nn.Module, loras: Sequence[Lora], gates: FullGates) -> dict[str, "_Hook"]:
    hooks = {}
    for name, _ in model.named_modules():
        deltas = [(concept, dense(lora[name])) for concept, lora in enumerate(loras) if name in lora]
        if deltas:
            hooks[name] = _Hook(name, deltas, gates)
    return hooks


@dataclass(frozen=True)
class _Hook:
    name: str
    deltas: Sequence[tuple[int, Tensor]]
    gates: FullGates

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        layer = getattr(module, "base_layer", module)
        total = out.clone()
        for concept, delta in self.deltas:
            delta = delta.to(out.dtype)
            if isinstance(layer, nn.Conv2d):
                change = F.conv2d(inputs[0], delta, None, layer.stride, layer.padding, layer.dilation)
            else:
                change = F.linear(inputs[0], delta)
            total = total + change * self._gate(out, concept).to(out.dtype)
        return total

    def _gate(self, out: Tensor, concept: int) -> Tensor:
        if out.ndim == 4:
            return self.gates.image[out.shape[2], out.shape[3]][:, None, :, :, concept]
        if out.ndim == 2:
            return self.gates.row[:, None, concept]
        if self.name.endswith(("attn2.to_k", "attn2.to_v")):
            return self.gates.text[:, :, None, concept]
        return self.gates.of_image(out.shape[1])[:, :, None, concept]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def cells(box: tuple[int, int, int, int], canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The cells that lie inside a box altogether: 1 from ceil(top) to floor(bottom). Shape: [height, width]."""
    left, top, right, bottom = box
    inside = torch.zeros(grid)
    scale = grid[0] / canvas[0], grid[1] / canvas[1]
    rows = slice(math.ceil(top * scale[0]), math.floor(bottom * scale[0]))
    inside[rows, math.ceil(left * scale[1]) : math.floor(right * scale[1])] = 1
    return inside


@dataclass
class WrittenOut:
    """Attention with dense masks and dense deltas, for one layer of a plain model.

    What a cell reads in several regions is projected for each of them, and the mean counts.

    regions: by number of cells, 1 inside. Shape: [cells, regions].
    acting: 1 in the rows in which LoRAs act. Shape: [rows, 1, 1].
    texts: of the background and of the regions. Shape: [texts, rows, tokens, channels].
    loras: those of the texts, background first, at full weight.
    seen: probabilities in the last pass, in double precision: those of all cells for every text, or for each other.
        Shape: [rows, heads, cells, tokens or cells] each.
    """

    name: str
    regions: dict[int, Tensor]
    acting: Tensor
    texts: Tensor
    loras: Sequence[Lora]
    isolate: bool
    seen: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.seen.clear()
        project, dropout = attn.to_out  # pyright: ignore[reportGeneralTypeIssues]
        member = self.regions[hidden_states.shape[1]]
        query, sides = attn.to_q(hidden_states), (attn.to_k, attn.to_v)
        if encoder_hidden_states is None:
            same, anywhere = member @ member.T > 0, member.sum(dim=1) > 0
            hidden = anywhere[:, None] & anywhere[None, :] & ~same & self.isolate
            key, value = (side(hidden_states) for side in sides)  # pyright: ignore[reportOptionalCall]
            out = self._attend(attn, query, key, value, hidden)
        else:
            times = member.sum(dim=1, keepdim=True)
            reads = torch.cat([(times == 0).float(), member / times.clamp(min=1)], dim=1)
            nothing = torch.zeros(query.shape[1], self.texts.shape[2], dtype=torch.bool)
            parts = []
            for text, lora in zip(self.texts, self.loras, strict=True):
                key, value = (
                    self._with_lora(side, text, lora[f"{self.name}.{which}"])
                    for which, side in zip(("to_k", "to_v"), sides, strict=True)
                )
                attended = self._attend(attn, query, key, value, nothing)
                parts.append(self._with_lora(project, attended, lora[f"{self.name}.to_out.0"]))
            return torch.einsum("pn,nrpc->rpc", reads, torch.stack(parts))
        return dropout(project(out))

    def _with_lora(self, layer: Any, x: Tensor, factors: Any) -> Tensor:
        return layer(x) + self.acting * (x @ dense(factors).T)

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = (query @ key.transpose(-1, -2) * attn.scale).masked_fill(hidden, -torch.inf)
        exact = (query.double() @ key.double().transpose(-1, -2) * attn.scale).masked_fill(hidden, -torch.inf)
        self.seen.append(exact.softmax(dim=-1))
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
