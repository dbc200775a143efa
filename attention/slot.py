"""The one channel through which a UNet pass is told what it needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_compose.attention.gates import GateKey
from lora_compose.attention.layout import Layout
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.text_kv import TextKV


@dataclass
class Slot:
    """What the bank layers and attention processors of one model read during a pass.

    Only `Installation.use` writes it. What it holds stays until the next pass, because gradient checkpointing enters
    the forward again during backward.

    Attributes:
        gates: Expanded gates by key; a missing key is an error.
        text_kv: Kept keys and values of cross-attention.
        recorders: Take attention maps, if any are wanted.
        layout: What attention does differently in regions, if there are any.
        texts: What cross-attention reads instead of the text that the UNet was given, with a layout. Shape: [texts,
            rows, tokens, channels].
    """

    gates: dict[GateKey, Tensor] = field(default_factory=dict)
    text_kv: TextKV | None = None
    recorders: Sequence[Recorder] = ()
    layout: Layout | None = None
    texts: Tensor | None = None
