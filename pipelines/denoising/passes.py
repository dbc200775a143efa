"""One forward pass of the model as values: its inputs, the attention maps to record, and its results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_compose.attention import Gates, JointRegions, NormRegions, Recorder, RegionAttention, TextBias
from lora_compose.pipelines.scene.regions import Window
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.text.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of one forward pass besides latents and timestep.

    Attributes:
        text: The text of all rows.
        gates: How strongly each concept acts where.
        regions: Region attention; required with several texts.
        window: Rows and columns of the latents, for a part of the canvas; None is all of it.
        image: Index of the image, for a pass of one image; None means all.
        branch_batch_size: Number of branches that are run together, to save memory; None means all.
        joint_regions: Region attention for text and image in one sequence.
        text_bias: Added to the scores between image and text; not with `RegionAttention`.
        norm_regions: The regions over which group normalisation takes its statistics; None is the whole canvas.
    """

    text: Conditioning
    gates: Gates
    regions: RegionAttention | None = None
    window: Window | None = None
    image: int | None = None
    branch_batch_size: int | None = None
    joint_regions: JointRegions | None = None
    text_bias: TextBias | None = None
    norm_regions: NormRegions | None = None


@dataclass(frozen=True, eq=False)
class MapRequest:
    """The attention maps to record in a pass.

    Attributes:
        tokens: Weight of every token in every map. Shape: [(texts,) rows, tokens, maps].
        self_attention: Whether to record maps of self-attention, too.
        layers: The attention layers whose maps are recorded, of `Backbone.word_layers`; none means the map layers.
        output_layer: An attention layer whose output at the cells is recorded, too.
    """

    tokens: Tensor
    self_attention: bool = False
    layers: Sequence[str] = ()
    output_layer: str | None = None


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention maps on the map grid, fp32, mean over heads and layers.

    Attributes:
        text: Attention of image cells to tokens. Shape: [(texts,) rows, cells, maps].
        cells: Attention of image cells to each other, if asked for. Shape: [rows, cells, cells seen].
        output: Output of a self-attention layer, if asked for. Shape: [rows, cells, channels].
        by_layer: The maps of attention to tokens by layer, of which `text` is the mean.
    """

    text: Tensor
    cells: Tensor | None = None
    output: Tensor | None = None
    by_layer: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, recorder: Recorder) -> "AttentionMaps":
        """The means of a recorder's maps."""
        cells = recorder.self_mean() if recorder.self_maps else None
        return cls(recorder.mean(), cells, recorder.output, by_layer=dict(recorder.maps))

    def detached(self) -> "AttentionMaps":
        """The maps without a graph."""
        cells, output = (None if value is None else value.detach() for value in (self.cells, self.output))
        by_layer = {name: value.detach() for name, value in self.by_layer.items()}
        return AttentionMaps(self.text.detach(), cells, output, by_layer=by_layer)


Readout = Callable[[AttentionMaps], Tensor]
"""Values of the attention maps of one pass that the host needs."""

Loss = Callable[[AttentionMaps], Tensor]
"""A loss on the attention maps of one pass. Shape: [images]."""


@dataclass(frozen=True)
class MapLoss:
    """A loss on attention maps whose gradient is wanted, and what else the pass is run for.

    Attributes:
        request: The maps, of conditional rows, or of all rows with `whole`.
        whole: Whether to run the whole model, also on unconditional rows, for a prediction.
        readout: Further values of the maps for the host. They come with the losses, so that the host waits once.
    """

    request: MapRequest
    loss: Loss
    whole: bool = False
    readout: Readout | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction of one forward pass.

    Attributes:
        model_output: Noise or velocity, as the scheduler takes it. Shape: [rows, channels, height, width].
        rows: The roles of its rows.
        maps: The attention maps, if asked for.
    """

    model_output: Tensor
    rows: Rows
    maps: AttentionMaps | None = None

    @property
    def branches(self) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional branches. Shape: [branches, images, channels, height, width] each."""
        parts = self.model_output[self.rows.unconditional], self.model_output[self.rows.conditional]
        uncond, cond = (part.reshape(-1, self.rows.images, *part.shape[1:]) for part in parts)
        return uncond, cond


def weighted_mean(predictions: Sequence[Prediction], weights: Sequence[float | Tensor]) -> Prediction:
    """The weighted mean of predictions of the same rows; a single one is returned as it is.

    Args:
        weights: One for each, which add up to 1; a tensor has one for each image. Shape: [images, 1, 1, 1].
    """
    first, *others = predictions
    if not others:
        return first
    weighted = []
    for prediction, weight in zip(predictions, weights, strict=True):
        by_branch = prediction.model_output.unflatten(0, (-1, prediction.rows.images))
        weighted.append((weight.to(by_branch.dtype) if isinstance(weight, Tensor) else weight) * by_branch)
    return replace(first, model_output=torch.stack(weighted).sum(dim=0).flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of a loss on attention maps.

    Attributes:
        losses: By image, fp32, on the CPU. Shape: [images].
        direction: With respect to the latents as the model gets them, in the scale of the latents, fp32. Shape: as the
            latents.
        maps: The attention maps, without a graph.
        prediction: The prediction, if the pass was run to its end.
        readout: The further values of the maps that were asked for, on the CPU.
    """

    losses: Tensor
    direction: Tensor
    maps: AttentionMaps
    prediction: Prediction | None = None
    readout: Tensor | None = None
