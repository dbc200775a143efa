"""The layer that normalises region by region, in the place of a group normalisation."""

from collections.abc import Callable

from torch import Tensor, nn

from lora_compose.attention.forward_state import ForwardState


class RegionNorm(nn.Module):
    """A group normalisation whose statistics are of regions in passes that have `LayerInputs.norm_regions`.

    It stands in the layer's place, or acts on its `forward`, as a bank layer does.

    Attributes:
        layer: The group normalisation as found, while concepts are installed.
        original_forward: The layer's `forward` as found, if this one acts on that; None if it stands in its place.
    """

    layer: nn.GroupNorm
    original_forward: Callable[[Tensor], Tensor] | None = None

    def __init__(self, state: ForwardState) -> None:
        super().__init__()
        self._state = state

    def act_on(self, layer: nn.Module, original_forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """As `BankLayer.act_on`."""
        self._modules["layer"] = layer
        self.__dict__.update(training=layer.training, original_forward=original_forward)

    def let_go(self) -> None:
        """Holds no layer any more."""
        self._modules.pop("layer", None)
        self.__dict__.pop("original_forward", None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output. Shape: [rows, channels, height, width]."""
        layer, regions = self.layer, self._state.inputs.norm_regions
        if regions is not None:
            x = regions.normalised(x, layer.num_groups, layer.eps)
        return layer(x) if self.original_forward is None else self.original_forward(x)
