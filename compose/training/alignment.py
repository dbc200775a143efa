"""Token alignment: the trigger's key becomes the class word's, so that both words look at the same places.

    L = mean over layers and channels of | W x_r + Delta x_r - W x_c |        (TARA, arXiv 2508.08812)

x_r and x_c are text features at the trigger and at the class word. The text encoder and W are frozen, so they and the
target W (x_c - x_r) are constants: the loss needs no pass of the network, no hook, and does not depend on image, noise
or timestep. It is 0 where keys are equal, and one rank for every token of the trigger suffices for that.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_compose.compose.training.words import WordFeatures


@dataclass(frozen=True, eq=False)
class _Layer:
    down: nn.Parameter
    up: nn.Parameter
    scale: float
    target: Tensor  # [rows, channels], fp32

    def delta(self, features: Tensor) -> Tensor:
        return F.linear(F.linear(features, self.down.float()), self.up.float()) * self.scale


@dataclass(frozen=True, eq=False)
class Alignment:
    """The token alignment loss of an adapter in closed form, for every `attn2.to_k`.

    `features` are the text features at the triggers, shape [rows, channels], fp32; `ranks` is how many the closed form
    takes, and the norm is "l1" or "l2" (squared).
    """

    layers: tuple[_Layer, ...]
    features: Tensor
    ranks: int
    norm: Literal["l1", "l2"]

    @classmethod
    def of(cls, network: nn.Module, adapter: str, rows: WordFeatures, norm: Literal["l1", "l2"]) -> "Alignment":
        """Computes the targets, on the network's device."""
        layers = []
        device = next(network.parameters()).device
        trigger, noun = rows.trigger.to(device), rows.noun.to(device)
        for name, layer in network.named_modules():
            if name.endswith("attn2.to_k") and isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                down, up = (side[adapter].get_parameter("weight") for side in (layer.lora_A, layer.lora_B))
                with torch.no_grad():
                    target = F.linear(noun - trigger, layer.get_base_layer().get_parameter("weight").float())
                layers.append(_Layer(down, up, float(layer.scaling[adapter]), target))
        return cls(tuple(layers), trigger, min(rows.ranks, len(layers[0].down)), norm)

    def loss(self, weights: Tensor) -> Tensor:
        """The distance between keys, each row weighted by `WordFeatures.weights`. Shape: [rows]."""
        with torch.autocast(self.features.device.type, enabled=False):
            losses = []
            for layer in self.layers:
                apart = layer.delta(self.features) - layer.target
                losses.append((apart.abs() if self.norm == "l1" else apart.square()).mean(-1) @ weights)
            return torch.stack(losses).mean()

    @torch.no_grad()
    def set_keys(self) -> None:
        """Sets the first ranks so that the trigger's key is the class word's, exactly or in the least squares.

        Exact as long as the rows span no more dimensions than there are ranks: one caption, or one word for the trigger
        whose features do not depend on what stands before it. The other ranks are left alone; they must give zero.
        """
        directions = torch.linalg.svd(self.features, full_matrices=False).Vh[: self.ranks]
        coordinates = self.features @ directions.T
        # A pseudo-inverse and not a solver: repeated captions make this matrix rank-deficient.
        inverse = torch.linalg.pinv(coordinates)
        for layer in self.layers:
            layer.down[: self.ranks] = directions.to(layer.down.dtype)
            layer.up[:, : self.ranks] = ((inverse @ layer.target).T / layer.scale).to(layer.up.dtype)

    def freeze_keys(self) -> None:
        """Ties the keys: they are set, all other ranks are zero, and nothing of them is trained."""
        for layer in self.layers:
            layer.down.requires_grad_(False).zero_()
            layer.up.requires_grad_(False).zero_()
        self.set_keys()
