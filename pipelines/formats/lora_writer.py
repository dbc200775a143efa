"""Low-rank factors -> the keys and tensors of an ordinary LoRA file, in diffusers' spelling or in kohya's.

Scales are multiplied into the factors. diffusers' files have no alphas. kohya's have the same alpha in all layers, even
where ranks differ: diffusers 0.42 drops alphas that differ from the most common one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.models import TEXT_ENCODERS, models_by_part
from lora_compose.pipelines.formats.names import original_names

Spelling = Literal["diffusers", "kohya"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)


@dataclass(frozen=True)
class FileLayer:
    """A layer as a file names it.

    Attributes:
        stem: Common beginning of its keys, including part and prefix.
        kernel: Kernel height and width of a convolution; () for a linear layer.
    """

    stem: str
    kernel: tuple[int, ...] = ()


def stems(spelling: Spelling, pipe: object, names: Mapping[Part, list[str]]) -> dict[tuple[Part, str], str]:
    """The beginning of the keys of each layer of a pipeline.

    kohya's scripts use diffusers' names of a UNet's blocks for SD 1.x and 2.x, and the original checkpoint's for SDXL.
    Those for transformers join layers that are apart in diffusers, so that a change of one alone has no name there.

    Args:
        pipe: A pipeline, or anything with such a model and text encoders.
        names: The layers, as the models have them, by part.

    Raises:
        ValueError: For kohya's spelling of a transformer, or of what prepares its text.
    """
    if spelling == "kohya" and (names.get("transformer") or names.get("text_conditioner")):
        raise ValueError("the keys of kohya for transformers join layers that are apart here; write those of diffusers")
    models = models_by_part(pipe)
    two = "text_encoder_2" in models
    first = "lora_te1_" if two else "lora_te_"
    kohya: Mapping[Part, str] = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    blocks = original_names(models["unet"]) if spelling == "kohya" and two and names.get("unet") else {}
    written = {}
    for part, layers in names.items():
        for name in layers:
            # transformers 5 removed the outer name of CLIP's layers, which all files have
            outer = "text_model." if part in TEXT_ENCODERS and name.startswith("encoder.layers.") else ""
            own = f"{outer}{name}"
            own = blocks.get(name, own) if part == "unet" else own
            written[part, name] = f"{kohya[part]}{own.replace('.', '_')}" if spelling == "kohya" else f"{part}.{own}"
    return written


def tensors(
    spelling: Spelling, layer: FileLayer, change: LoraFactors, dtype: torch.dtype, alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of one layer, from matrices at scale 1; with rank 0 there is nothing to write.

    `dtype` is the precision of the factors, `alpha` that of all layers, for kohya's files; where it equals the rank,
    the factors are written unchanged.
    """
    if not change.rank:
        return
    down, up = change.down, change.up
    if layer.kernel:
        down, up = down.reshape(len(down), -1, *layer.kernel), up[:, :, None, None]
    if spelling == "kohya":
        up = up * (change.rank / alpha)
    sides = {"diffusers": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}[spelling]
    for side, tensor in zip(sides, (down, up), strict=True):
        yield f"{layer.stem}.{side}.weight", tensor.to(dtype)
    if spelling == "kohya":
        yield f"{layer.stem}.alpha", torch.tensor(float(alpha))
