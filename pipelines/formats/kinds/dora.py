"""DoRA: a LoRA, LoHa or LoKr whose changed weight W + D gets norms of its own (arXiv 2402.09353).

The norms of PEFT (`lora_magnitude_vector`) and ai-toolkit (`magnitude`) are of the outputs, in every shape ([outputs],
or [1, outputs, 1, 1] for a convolution). LyCORIS, kohya and OneTrainer have a `dora_scale`: [outputs] and [outputs, 1,
...] are of the outputs, [1, inputs, ...] of the inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lora_compose.attention.transforms import Rescaling
from lora_compose.pipelines.formats.change import Change
from lora_compose.pipelines.formats.kinds.kind import Kind, Placement, Shapes, Tensors, check_own, first_of, own_outputs
from lora_compose.pipelines.formats.kinds.loha import LOHA
from lora_compose.pipelines.formats.kinds.lokr import LOKR
from lora_compose.pipelines.formats.kinds.low_rank import LOW_RANK, TUCKER

_INNER = (LOKR, LOHA, TUCKER, LOW_RANK)
_OWN = ("magnitude", "dora_scale")


def _inner(slots: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """The kind of the change that is rescaled, and its tensors."""
    rest = {slot: value for slot, value in slots.items() if slot not in _OWN}
    kind = first_of(_INNER, rest)
    if kind is None:
        raise ValueError(f"it has {', '.join(sorted(slots))}, but no change that is rescaled; the file is incomplete")
    check_own(kind, rest)
    return kind, rest


def _norms(shapes: Shapes) -> tuple[str, bool]:
    """The slot of the norms, and whether they are of the inputs."""
    slot, *more = (slot for slot in _OWN if slot in shapes)
    shape = shapes[slot]
    if more or not shape or sum(side != 1 for side in shape) > 1:
        raise ValueError(f"{' and '.join([slot, *more])} has shape {list(shape)}; expected one norm by output or input")
    return slot, slot == "dora_scale" and len(shape) > 1 and _at(shape) != 0


def _at(shape: Sequence[int]) -> int:
    """The only axis of the norms that is longer than 1."""
    return next((i for i, side in enumerate(shape) if side != 1), 0)


def _sides(shapes: Shapes) -> tuple[int | None, int | None]:
    (slot, by_input), (kind, rest) = _norms(shapes), _inner(shapes)
    outputs, inputs = kind.sides(rest)
    count, side = math.prod(shapes[slot]), inputs if by_input else outputs
    if side is None or count == 0 or (side % count if by_input else side != count):
        raise ValueError(
            f"{slot} has {count} norms of {'inputs' if by_input else 'outputs'}, and the change is {outputs} x {inputs}"
        )
    return outputs, inputs


def _factors(tensors: Tensors, max_rank: int, products: bool) -> Change:
    kind, rest = _inner(tensors)
    _, by_input = _norms({slot: tensor.shape for slot, tensor in tensors.items()})
    return kind.load(rest, 1.0, max_rank, products=products and not by_input)


def _transform(tensors: Tensors, _settings: Mapping[str, Any]) -> Rescaling:
    slot, by_input = _norms({slot: tensor.shape for slot, tensor in tensors.items()})
    norms = tensors[slot].float().flatten()
    if not bool((norms >= 0).all()) or not bool(norms.any()):  # a single 0 may be an output that training switched off
        raise ValueError(f"{slot} has norms from {norms.min():.3g} to {norms.max():.3g}; expected positive numbers")
    return Rescaling(norms, by_input)


def _placed(transform: Rescaling, place: Placement, _target: nn.Module) -> Rescaling:
    if transform.by_input:
        return replace(transform, fused=place.fused)
    return Rescaling(own_outputs(transform, place))


DORA = Kind(
    "DoRA",
    {"magnitude": r"\.lora_magnitude_vector(?:\.\w++){0,3}+|\.magnitude", "dora_scale": r"\.dora_scale"},
    _sides,
    factors=_factors,
    transform=_transform,
    placed=_placed,
    beside=[slot for kind in _INNER for slot in (*kind.endings, *kind.beside)],
    ranked=[slot for kind in _INNER for slot in kind.ranked],
    setting="use_dora",
)
