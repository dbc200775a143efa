"""The one channel through which the layers of a model are told what the current forward pass needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_compose.attention.gates import GateKey
from lora_compose.attention.joint_regions import JointRegions
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.regions import RegionAttention
from lora_compose.attention.sites import Grid
from lora_compose.attention.text_kv import TextKV


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What layers need in a forward pass: made once per pass by `Installation.inputs`, used in every step.

    Attributes:
        gates: Expanded gates by kind of layer; a missing key is an error.
        text_kv: Keys and values of cross-attention, kept between steps.
        regions: What attention does differently in regions, if there are any.
        texts: What cross-attention reads instead of the text that the model was given, with regions. Shape: [texts,
            rows, tokens, channels].
        joint_regions: The same for text and image in one sequence.
        lengths: Tokens of the text by row.
        latent_grid: Height and width of the latents.
    """

    gates: Mapping[GateKey, Tensor] = field(default_factory=dict)
    text_kv: TextKV | None = None
    regions: RegionAttention | None = None
    texts: Tensor | None = None
    joint_regions: JointRegions | None = None
    lengths: tuple[int, ...] = (1,)
    latent_grid: Grid = (1, 1)


@dataclass
class ForwardState:
    """What the bank layers and attention processors of one model read during a pass.

    Only `Installation.use` writes it. What it holds stays until the next pass, because gradient checkpointing enters
    the forward again during backward.

    Attributes:
        inputs: Gates, texts and regions of the pass.
        recorders: Take attention maps, if any are wanted.
    """

    inputs: LayerInputs = field(default_factory=LayerInputs)
    recorders: Sequence[Recorder] = ()
