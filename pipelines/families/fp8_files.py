"""Denoisers in one file in float8, as Black Forest Labs and ComfyUI write them, in the layout that diffusers reads.

A weight W in float8 stands for s W with a scale s: one for the layer (ComfyUI: `scale_weight`, later `weight_scale`) or
one for each output (Black Forest Labs: `weight_scale`), which is what diffusers' `BFLQuantizationConfig` reads. Files
without scales are plain weights. Source of ComfyUI's names: `comfy/quant_ops.py` and `comfy/ops.py`.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_SCALES = (".weight_scale", ".scale_weight")
_NOT_READ = (".scale_input", ".input_scale", ".comfy_quant")  # scales of inputs are taken from the inputs themselves
_MARK = "scaled_fp8"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMAT = "float8_e4m3fn"


def float8_checkpoint(path: Path, dtype: torch.dtype, prefix: str = "") -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file for `from_single_file`, and whether they have scales for `BFLQuantizationConfig`.

    Layers outside of the numbered blocks are few; they are dequantised to `dtype`, which the model's precision is then.
    `prefix` is taken off all names. Raises ValueError for files without float8, and for other layouts.
    """
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    if any(name.endswith(".weight_scale_2") for name in tensors):
        raise ValueError(
            f"{path.name} is in NVFP4, whose scales are stored in two orders that a file does not tell apart; use the "
            f"same model in fp8 ({_FORMAT}) or GGUF, or the model itself with nf4 or int8"
        )
    _check_formats(path, tensors)
    if not any(tensor.dtype in _FLOAT8 for tensor in tensors.values()):
        raise ValueError(
            f"{path.name} has no weights in float8; expected a denoiser in fp8, or a GGUF file. A whole model in one "
            "file is opened as the model itself"
        )
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_SCALES, *_NOT_READ))}
    weights.pop(_MARK, None)
    scaled = False
    for ending in _SCALES:
        for name in [name for name in tensors if name.endswith(ending)]:
            stem = name.removesuffix(ending)
            weight, scale = weights.get(f"{stem}.weight", torch.empty(0)), tensors[name].float().flatten()
            if weight.dtype != torch.float8_e4m3fn or len(scale) not in (1, len(weight)):
                raise ValueError(
                    f"{path.name}: {stem} is {list(weight.shape)} in {str(weight.dtype).removeprefix('torch.')} with "
                    f"{len(scale)} scales; expected {_FORMAT} with one for the layer, or one for each output"
                )
            scale = scale.expand(len(weight)).contiguous()
            if weight.dim() == 2 and re.search(r"\.\d+\.", stem):
                weights[f"{stem}.weight_scale"], scaled = scale, True
            else:
                weights[f"{stem}.weight"] = (weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))).to(dtype)
    return weights, scaled


def _check_formats(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for formats of ComfyUI that are no float8 with a scale."""
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            kind = json.loads(bytes(tensor.tolist())).get("format")
            if kind != _FORMAT:
                raise ValueError(
                    f"{path.name} is in {kind}, a layout of ComfyUI that diffusers does not read; use the same "
                    f"model in fp8 ({_FORMAT}) or GGUF, or the model itself with nf4 or int8"
                )
