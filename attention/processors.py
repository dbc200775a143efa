"""The attention processor that is in place while concepts are installed."""

from collections.abc import Callable, Sequence
from typing import cast

from diffusers.models.attention_processor import Attention
from torch import Tensor

from lora_compose.attention.kernels import Kernel
from lora_compose.attention.layers import AttentionLayer
from lora_compose.attention.slot import Slot


class ComposeAttnProcessor:
    """Attention with kept text keys and values and with recording; the kernel is the one found.

    LoRA deltas need nothing here: the projections are bank layers. Facts of the layer are given when it is built,
    what a pass needs is read from the slot, and nothing of a call is kept on the processor.

    Args:
        layer: The attention layer it serves.
        kernel: How attention is computed.
        slot: What the current pass needs.
    """

    def __init__(self, layer: AttentionLayer, kernel: Kernel, slot: Slot) -> None:
        self._layer = layer
        self._kernel = kernel
        self._slot = slot

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attends. The frame around the kernel follows diffusers' AttnProcessor2_0 (0.42).

        Args:
            attn: The module, which owns the projections.
            hidden_states: Shape: [rows, cells, channels].
            encoder_hidden_states: The text; None for self-attention. Shape: [rows, tokens, channels], or [rows, tokens,
                layers * channels] with a text for each cross-attention layer, in forward order.
            attention_mask: Not supported, must be None.
            temb: Unused, part of the interface.
        """
        if attention_mask is not None:
            raise ValueError("attention masks of the caller cannot be combined with concepts")
        residual = hidden_states
        query = attn.to_q(hidden_states)
        key, value = self._key_value(attn, hidden_states, encoder_hidden_states)
        query, key, value = (_split_heads(x, attn.heads) for x in (query, key, value))
        self._record(query, key, attn.scale)
        hidden_states = self._attend(query, key, value)
        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        project, dropout = cast("Sequence[Callable[[Tensor], Tensor]]", attn.to_out)
        hidden_states = dropout(project(hidden_states))
        if self._layer.cross and self._slot.layout is not None:
            hidden_states = self._slot.layout.gathered(self._layer.level, hidden_states)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = self._slot.layout
        if layout is None:
            return self._kernel(query, key, value)
        attend = layout.cross if self._layer.cross else layout.self_attention
        return attend(self._kernel, self._layer.level, query, key, value)

    def _record(self, query: Tensor, key: Tensor, scale: float) -> None:
        layout, name = self._slot.layout, self._layer.name
        for recorder in self._slot.recorders:
            isolated = layout is not None and layout.isolate and name in recorder.self_layers
            allowed = layout.partitions[self._layer.level].allowed if isolated else None  # pyright: ignore[reportOptionalMemberAccess]
            recorder.take(name, query, key, scale, allowed)

    def _key_value(self, attn: Attention, hidden_states: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        if text is not None:
            text = self._own(text if self._slot.texts is None else self._slot.texts, attn.cross_attention_dim)

        def project() -> tuple[Tensor, Tensor]:
            source = hidden_states if text is None else text
            if text is not None and attn.norm_cross:
                source = attn.norm_encoder_hidden_states(text)
            return attn.to_k(source), attn.to_v(source)  # pyright: ignore[reportOptionalCall]

        text_kv = self._slot.text_kv
        if text is None or text_kv is None:
            return project()
        return text_kv.get(self._layer.name, project)

    def _own(self, text: Tensor, width: int) -> Tensor:
        """This layer's part of the text, where all layers have texts of their own side by side in its channels."""
        if text.shape[-1] == width or text.shape[-1] != width * self._layer.peers:
            return text
        return text[..., self._layer.order * width : (self._layer.order + 1) * width]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., rows, positions, heads * channels] -> [..., rows, heads, positions, channels]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(-3, -2)
