"""One layer with several gated concepts, and what they do to its weight by their formulas."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention import Gates, How, Lora, LoraFactors, Site, installed_layers
from lora_compose.attention.transforms import Rescaling, Rotation

ROWS, TOKENS, SIDE, IN, OUT, RANK, BLOCK = 4, 5, 6, 8, 12, 3, 4
CPU = torch.device("cpu")
Kind = Literal["DoRA", "DoRA of inputs", "LoKr with DoRA", "OFT", "OFT of inputs"]
KINDS: tuple[Kind, ...] = ("DoRA", "DoRA of inputs", "LoKr with DoRA", "OFT", "OFT of inputs")


def rotation(size: int) -> Tensor:
    skew = torch.randn(size // BLOCK, BLOCK, BLOCK) / 4
    return torch.matrix_exp(skew - skew.mT)


def concept(kind: Kind | None, weight: Tensor, seed: int) -> tuple[LoraFactors, Tensor]:
    """Factors, and the changed weight from the formula of the kind; None is a plain LoRA."""
    torch.manual_seed(seed)
    outputs, inputs = weight.shape[:2]
    ones = [1] * (weight.dim() - 2)
    down, up = torch.randn(RANK, *weight.shape[1:]) / 3, torch.randn(outputs, RANK, *ones) / 3
    delta = 0.7 * (up.flatten(1).double() @ down.flatten(1).double()).view_as(weight)
    if kind is None:
        return LoraFactors(down, up, 0.7), weight + delta
    if kind == "LoKr with DoRA":
        left, down, up = torch.randn(2, 2) / 2, torch.randn(4, inputs // 2) / 2, torch.randn(outputs // 2, 4) / 2
        changed = weight + torch.kron(left.double(), 0.7 * up.double() @ down.double())
        norms = 1 + torch.rand(outputs)
        return LoraFactors(down, up, 0.7, left, Rescaling(norms)), norms.double()[:, None] * F.normalize(changed, dim=1)
    if kind == "DoRA":
        norms = 1 + torch.rand(outputs)
        changed = F.normalize((weight + delta).flatten(1), dim=1) * norms.double()[:, None]
        return LoraFactors(down, up, 0.7, transform=Rescaling(norms)), changed.view_as(weight)
    if kind == "DoRA of inputs":
        norms, columns = 1 + torch.rand(inputs), (weight + delta).transpose(0, 1)
        changed = F.normalize(columns.flatten(1), dim=1) * norms.double()[:, None]
        found = LoraFactors(down, up, 0.7, transform=Rescaling(norms, by_input=True))
        return found, changed.view_as(columns).transpose(0, 1)
    down, up = torch.empty(0, *weight.shape[1:]), torch.empty(outputs, 0, *ones)
    if kind == "OFT":
        turn = rotation(outputs)
        whole = torch.block_diag(*turn).double()
        return LoraFactors(down, up, transform=Rotation(turn)), torch.einsum("po,oi...->pi...", whole, weight)
    turn = rotation(weight[0].numel())
    whole = weight.flatten(1) @ torch.block_diag(*turn).double()
    return LoraFactors(down, up, transform=Rotation(turn, True)), whole.view_as(weight)


def gates_by(what: str, concepts: int) -> Gates:
    """The first rows are unconditional: gates of 0."""
    torch.manual_seed(7)
    text = torch.rand(ROWS, TOKENS if what == "token" else 1, concepts) * 2 - 0.5
    image = torch.rand(ROWS, SIDE * SIDE if what == "cell" else 1, concepts) * 2 - 0.5
    text[: ROWS // 2] = image[: ROWS // 2] = 0
    return Gates(text, {0: image}, image[:, 0], (SIDE, SIDE))


def run(
    layer: nn.Module, loras: list[LoraFactors], gates: Gates, x: Tensor, how: How = "module", **rest: Any
) -> Tensor:
    """The layer with its concepts, in a model of its own."""
    model = nn.ModuleDict({"layer": layer})
    site = Site("text" if not isinstance(layer, nn.Conv2d) and x.shape[1] == TOKENS else "image")
    each: list[Lora] = [{"layer": one} for one in loras]
    to = {"device": CPU, "dtype": x.dtype}
    with installed_layers(model, each, {"layer": site}, how=how, **to, **rest) as there, torch.no_grad():
        there.use(there.inputs(gates, lengths=[TOKENS] * ROWS))
        return model["layer"](x)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
