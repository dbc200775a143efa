"""Token focus masking: in keys and values of cross-attention a LoRA acts on the trigger's tokens alone.

    K = X W_K^T + diag(m) X Delta_K^T        the same for V, m_i in {0, 1}        (TARA, arXiv 2508.08812)

The mask is put on the output of the LoRA's second factor, by a layer that replaces it: other tokens stay bit-identical
to the base model. The layer looks the mask up when it is called, and it stays until the next batch, so that gradient
checkpointing, which calls the layer again during the backward pass, finds the same one.
"""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass
class Focus:
    """The mask of the batch that is being computed: 1 at the trigger's tokens. Shape: [rows, tokens, 1].

    Attributes:
        in_training: Whether batches of the training are masked; sample images always are, as in inference.
    """

    mask: Tensor | None = None
    in_training: bool = True


class FocusedLinear(nn.Linear):
    """A linear layer without bias whose output is masked."""

    def __init__(self, linear: nn.Linear, focus: Focus) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.focus = focus

    def forward(self, input: Tensor) -> Tensor:
        """Shape: [rows, tokens, in] to [rows, tokens, out]."""
        mask = self.focus.mask
        if mask is None or mask.shape[:2] != input.shape[:2]:
            shape = None if mask is None else tuple(mask.shape)
            raise RuntimeError(f"the token mask is {shape}, the text {tuple(input.shape)}; both need the same rows")
        output = super().forward(input)
        return output * mask.to(output.dtype)


def focus_on_triggers(network: nn.Module, adapter: str, *, in_training: bool = True) -> Focus:
    """Puts a mask on an adapter's keys and values of cross-attention, and returns where to set it."""
    focus = Focus(in_training=in_training)
    for name, layer in network.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(layer, LoraLayer) and adapter in layer.lora_B:
            second = layer.lora_B[adapter]
            assert isinstance(second, nn.Linear)
            layer.lora_B[adapter] = FocusedLinear(second, focus)
    return focus
