"""OFT: the weight is rotated, in blocks on the diagonal (arXiv 2306.07280, OFTv2 arXiv 2506.19847).

With a skew-symmetric Q by block, Cayley's transform (1 + Q) (1 - Q)^-1 is a rotation.

kohya and LyCORIS (`oft_blocks`, Q = blocks - blocks^T) rotate outputs by the transpose of that; alpha times the outputs
bounds the norm of all Q together, 0 is no bound, and LyCORIS may multiply each output afterwards. For FLUX.1, kohya
numbers the parts of a fused layer (`oft_blocks.0`, ...), each with blocks and a bound of its own. PEFT and OneTrainer
(`oft_R`, the numbers above Q's diagonal) rotate inputs, by default with the first terms of a series in place of the
inverse. PEFT's exact form turns the other way, and so does OneTrainer in convolutions. OneTrainer may divide Q by
2 sqrt(size - 1). In convolutions larger than 1 x 1 OneTrainer rotates all numbers that an output reads; PEFT has no
one meaning there.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.fitting import weight_shape
from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.attention.transforms import Rotation
from lora_compose.pipelines.formats.change import Change, check_finite
from lora_compose.pipelines.formats.kinds.kind import Kind, Placement, Shapes, Tensors, own_outputs

MAX_BLOCK = 4096
"""The largest block: its inverse costs its cube. kohya's files have 4 blocks, of the widest layers."""
_MAX_TERMS = 32
_PARTS = ("oft_blocks", *(f"oft_blocks_{i}" for i in range(1, 4)))  # the widest fused layer has four
_TERMS = 5  # PEFT's default


def _without_factors(_tensors: Tensors, _max_rank: int, _products: bool) -> Change:
    return Change(LoraFactors(torch.empty(0, 0), torch.empty(0, 0)))


def _checked(count: int, size: int) -> None:
    if not (count > 0 and 1 < size <= MAX_BLOCK):
        raise ValueError(f"it has {count} blocks of size {size}; expected some of size 2 to {MAX_BLOCK}")


def _split(slots: Collection[str]) -> Sequence[Mapping[str, str]]:
    """The slots of each numbered part."""
    parts = [slot for slot in _PARTS if slot in slots]
    rest = {slot: slot for slot in slots if slot not in _PARTS}
    return [{"oft_blocks": slot, **rest} for slot in parts] if len(parts) > 1 else ()


def _output_sides(shapes: Shapes) -> tuple[int | None, int | None]:
    if len(parts := [slot for slot in _PARTS if slot in shapes]) > 1:
        raise ValueError(f"it rotates {len(parts)} parts of a layer, one in the model; expected as many layers")
    blocks = shapes.get("oft_blocks", ())
    if len(blocks) != 3 or blocks[1] != blocks[2]:
        raise ValueError(
            f"oft_blocks has shape {list(blocks)}; expected [blocks, size, size] (BOFT has more dimensions)"
        )
    _checked(blocks[0], blocks[1])
    outputs, factors = blocks[0] * blocks[1], shapes.get("oft_rescale")
    if factors is not None and (math.prod(factors) != outputs or factors[0] != outputs):
        raise ValueError(f"rescale has shape {list(factors)}; expected one number for each of {outputs} outputs")
    return outputs, None


def _of_outputs(tensors: Tensors, settings: Mapping[str, Any]) -> Rotation:
    blocks = tensors["oft_blocks"].float()
    skew = blocks - blocks.mT
    bound = float(settings.get("alpha", 0.0)) * len(blocks) * blocks.shape[-1]
    norm = float(skew.norm())
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    identity = torch.eye(blocks.shape[-1])
    turned = torch.linalg.solve(identity + skew, identity - skew)
    if (factors := tensors.get("oft_rescale")) is not None:
        turned = factors.float().view(len(blocks), -1, 1) * turned
    check_finite(turned)
    return Rotation(turned)


def _size(numbers: int) -> int:
    """The side of a block with so many entries above its diagonal. Raises ValueError if there is none."""
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if size * (size - 1) // 2 != numbers:
        raise ValueError(f"oft_R has {numbers} numbers by block, which is no triangle of a square")
    return size


def _input_sides(shapes: Shapes) -> tuple[int | None, int | None]:
    shape = shapes["oft_vectors"]
    if len(shape) != 2:
        raise ValueError(f"oft_R has shape {list(shape)}; expected [blocks, numbers above the diagonal]")
    size = _size(shape[1])
    _checked(shape[0], size)
    return None, None if shape[0] == 1 else shape[0] * size  # one block may serve for all


def _of_inputs(tensors: Tensors, settings: Mapping[str, Any]) -> Rotation:
    if settings.get("coft"):
        raise ValueError("its rotation was constrained in training (coft), which is not supported")
    vectors = tensors["oft_vectors"].float()
    size = _size(vectors.shape[1])
    if settings.get("oft_scaled"):
        vectors = vectors / (2 * math.sqrt(size - 1))
    above = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(vectors), size, size)
    skew[:, above[0], above[1]] = vectors
    skew, identity = skew - skew.mT, torch.eye(size)
    if settings.get("use_cayley_neumann", True):
        turned = _series(skew, settings.get("num_cayley_neumann_terms", _TERMS)).mT
    else:
        turned = torch.linalg.solve(identity - skew, identity + skew)
    check_finite(turned)
    return Rotation(turned.contiguous(), by_input=True, shared=len(turned) == 1, turned_back=not settings.get("peft"))


def _series(skew: Tensor, terms: Any) -> Tensor:
    """1 + 2 Q + 2 Q^2 + ..., of which the last power counts once."""
    if not isinstance(terms, int) or not 1 <= terms <= _MAX_TERMS:
        raise ValueError(f"num_cayley_neumann_terms is {str(terms)[:20]!r}; expected a number from 1 to {_MAX_TERMS}")
    total, power, last = torch.eye(skew.shape[-1]).expand_as(skew), skew, max(3, terms - 1)
    if terms == 1:
        return total
    total = total + 2 * skew
    for i in range(2, last + 1 if terms > 2 else 0):
        power = power @ skew
        total = total + (1 if i == last else 2) * power
    return total


def _placed(transform: Rotation, place: Placement, _target: nn.Module) -> Rotation:
    return Rotation(own_outputs(transform, place))


def _turned(rotation: Rotation, _place: Placement, target: nn.Module) -> Rotation:
    """A rotation of the inputs of a layer, with as many blocks and in the direction that it has there."""
    values = rotation.values
    if rotation.shared:
        count, rest = divmod(math.prod(weight_shape(target, "")[1:]), values.shape[-1])
        if rest:
            raise ValueError(f"its blocks of size {values.shape[-1]} do not divide the layer's inputs")
        values = values.expand(count, -1, -1)
    return replace(rotation, values=values.mT if rotation.turned_back and isinstance(target, nn.Conv2d) else values)


def _unclear(target: nn.Module, of_peft: bool) -> str:
    if not of_peft or not isinstance(target, nn.Conv2d) or math.prod(target.kernel_size) == 1:
        return ""
    return (
        "PEFT's OFT of convolutions larger than 1 x 1 is not defined: as it is trained, overlapping patches are added "
        "up, also where nothing is rotated; as it is merged, the weight is rotated"
    )


OFT = Kind(
    "OFT",
    {"oft_blocks": r"\.oft_blocks(?:\.0)?+", "oft_rescale": r"\.rescale"}
    | {slot: rf"\.oft_blocks\.{i}" for i, slot in enumerate(_PARTS) if i},
    _output_sides,
    split=_split,
    factors=_without_factors,
    transform=_of_outputs,
    placed=_placed,
    scaled=False,
)
OFT_INPUTS = Kind(
    "OFT of inputs",
    {"oft_vectors": r"\.oft_R\.(?:\w++\.)?weight"},
    _input_sides,
    factors=_without_factors,
    transform=_of_inputs,
    placed=_turned,
    unclear=_unclear,
    scaled=False,
    flags={"oft_scaled": r"\.oft_R\.scaled_oft"},  # OneTrainer's
)
