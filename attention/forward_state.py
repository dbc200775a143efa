"""The state from which the layers of a model read what the current forward pass needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_compose.attention.gates import GateKey
from lora_compose.attention.joint_regions import JointRegions
from lora_compose.attention.kernels import Kernel
from lora_compose.attention.norm_regions import NormRegions
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.regions import RegionAttention
from lora_compose.attention.sites import Grid
from lora_compose.attention.text_bias import TextBias
from lora_compose.attention.text_kv import TextKV


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Inputs of the layers in a forward pass: made once per pass by `Installation.inputs`, used in every step.

    Attributes:
        gates: Expanded gates by kind of layer; a missing key is an error.
        text_kv: Keys and values of cross-attention, kept between steps.
        regions: Region attention; None without regions.
        texts: With regions: the texts that cross-attention reads instead of `encoder_hidden_states`. Shape: [texts,
            rows, tokens, channels].
        joint_regions: Region attention for text and image in one sequence.
        lengths: Number of text tokens in each row.
        latent_grid: Height and width of the latents.
        text_bias: Added to the scores between cells and tokens, by level. Shape: [rows, 1, cells, tokens].
        bias_factors: Factors of that bias, for attention to text and image in one sequence.
        text_end: Minus infinity at tokens that a row does not have, added as well; None if it has all. Shape: [rows, 1,
            1, tokens].
        norm_regions: The regions of group normalisation; None takes the whole canvas.
    """

    gates: Mapping[GateKey, Tensor] = field(default_factory=dict)
    text_kv: TextKV | None = None
    regions: RegionAttention | None = None
    texts: Tensor | None = None
    joint_regions: JointRegions | None = None
    lengths: tuple[int, ...] = (1,)
    latent_grid: Grid = (1, 1)
    text_bias: Mapping[int, Tensor] | None = None
    bias_factors: TextBias | None = None
    text_end: Tensor | None = None
    norm_regions: NormRegions | None = None

    def bias(self, level: int) -> Tensor | None:
        """The numbers added to the scores of cross-attention on a level; None if there are none."""
        bias, end = (self.text_bias or {}).get(level), self.text_end
        return end if bias is None else bias if end is None else bias + end


@dataclass
class ForwardState:
    """Inputs and recorders that bank layers and attention processors of one model read during a pass.

    Only `Installation.use` writes it. It keeps its content until the next pass, because gradient checkpointing runs the
    forward again during backward.

    Attributes:
        recorders: Recorders of attention maps; empty if none are wanted.
    """

    inputs: LayerInputs = field(default_factory=LayerInputs)
    recorders: Sequence[Recorder] = ()

    def attend(
        self,
        kernel: Kernel,
        layer: str,
        level: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        cross: bool,
    ) -> Tensor:
        """Attention of a layer of its own for self- or cross-attention: recorded, by region, with the bias of the text.

        Shapes as for `Kernel`; keys and values of cross-attention have texts before rows, if there are several.
        """
        regions, bias = self.inputs.regions, self.inputs.bias(level) if cross else None
        several_texts = self.inputs.texts is not None
        for recorder in self.recorders:
            isolated = regions is not None and regions.isolate and layer in recorder.self_layers
            allowed = regions.partitions[level].allowed if isolated else None  # pyright: ignore[reportOptionalMemberAccess]
            recorder.take(layer, query, key, scale, allowed, bias=bias, several_texts=several_texts)
        if regions is None:
            return kernel(query, key, value, bias)
        return regions.attend(kernel, level, query, key, value, bias, cross)
