"""LoRA files -> factors by layer, with a report. Files come from strangers: everything is checked before it is used."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download, list_repo_files
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from attention.install import check_factors
from attention.layers import places, uncompiled
from attention.lora_bank import Lora, LoraFactors

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# What a key says about files that hold something else than plain low-rank factors.
_OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "lora_mid": "a LoCon with Tucker factors (lora_mid)",
    ".diff.": "a file with full weight differences",
    ".diff_b.": "a file with full weight differences",
    "lora_B.bias": "a LoRA with biases",
}


class LoraError(ValueError):
    """A file or adapter that cannot be used as a concept; the message says why and what was expected."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read, before it meets a model.

    Attributes:
        path: The file.
        sha256: Of its content.
        metadata: The strings in its header.
        tensors: Its weights by key.
    """

    path: Path
    sha256: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Factors:
    """A LoRA's factors for the parts of one pipeline.

    Attributes:
        unet: For the UNet, by layer.
        text_encoders: For the text encoders, by component name and layer.
        unmatched: Keys of the file that found no layer.
    """

    unet: Lora
    text_encoders: Mapping[str, Lora] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """One line: how many layers of which part, which ranks, what was left over."""
        parts = [
            f"{len(lora)} {name} layers" for name, lora in {"unet": self.unet, **self.text_encoders}.items() if lora
        ]
        ranks = sorted(
            {factors.rank for lora in (self.unet, *self.text_encoders.values()) for factors in lora.values()}
        )
        line = f"{', '.join(parts)}, rank {'/'.join(map(str, ranks))}"
        if self.unmatched:
            line += f"; {len(self.unmatched)} keys fit no layer and are left out: {', '.join(self.unmatched[:3])}, ..."
        return line


def find_file(source: str | Path, weight_name: str | None = None, **hub: Any) -> Path:
    """The safetensors file behind a path, a folder or a hub repository.

    Args:
        source: A file, a folder, or a repository such as "user/my-cat-lora".
        weight_name: The file inside a folder or repository; not needed if there is only one.
        hub: Passed on to `huggingface_hub` (token, revision, cache_dir, local_files_only, ...).

    Raises:
        LoraError: If there is no such file, or several and none is named; for pickles.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        names = sorted(found.name for found in path.glob("*.safetensors"))
        return path / _only(names, weight_name, path)
    is_file = path.is_absolute() or path.suffix.lower() in {".safetensors", *_PICKLES}
    if is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        _refuse_pickle(path)
        raise LoraError(f"there is no file {str(source)!r}")
    if weight_name is None:
        access = {option: hub[option] for option in ("revision", "token") if option in hub}
        names = [name for name in list_repo_files(str(source), **access) if name.endswith(".safetensors")]
    else:
        names = [weight_name]
    return Path(hf_hub_download(str(source), _only(names, weight_name, source), **hub))


def _only(names: list[str], wanted: str | None, place: object) -> str:
    if wanted is not None:
        if wanted in names:
            return wanted
        raise LoraError(f"{place} has no {wanted!r}; it has {', '.join(names) or 'no safetensors files'}")
    if len(names) != 1:
        raise LoraError(f"{place} has {len(names)} safetensors files; say which with weight_name: {', '.join(names)}")
    return names[0]


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise LoraError(f"{path.name} is a pickle, which could run code when opened; convert it to safetensors first")


def read_lora(path: Path) -> LoraFile:
    """Reads and checks a file.

    Raises:
        LoraError: If it is a pickle, is truncated or corrupt, holds no LoRA or a kind that is not supported, or has
            weights that are not finite or not floating point.
    """
    _refuse_pickle(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path.name} is no readable safetensors file ({_other_format(path)}): {error}") from error
    for mark, kind in _OTHER_KINDS.items():
        if key := next((key for key in tensors if mark in f"{key}."), None):
            raise LoraError(
                f"{path.name} is {kind} (key {key!r}); only plain LoRA and LoCon factors are supported so far"
            )
    if not any("lora" in key for key in tensors):
        keys = ", ".join(list(tensors)[:3]) or "none"
        raise LoraError(f"{path.name} is no LoRA: expected keys with lora_A/lora_B or lora_down/lora_up, found {keys}")
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES and not key.endswith(".alpha"):  # some trainers write whole numbers
            raise LoraError(f"{path.name}: {key} is stored as {tensor.dtype}; expected float32, float16 or bfloat16")
        if not torch.isfinite(tensor).all():
            raise LoraError(f"{path.name}: {key} has values that are NaN or infinite; the file is damaged")
    return LoraFile(path, sha256, metadata, tensors)


def _other_format(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    pickled = start[:1] == b"\x80" or start == b"PK"  # a guess: sound safetensors files may begin so as well
    return "a pickle or an archive under another name" if pickled else "truncated or corrupt"


def match(file: LoraFile, pipe: Any) -> Factors:
    """Matches a file against the models of a pipeline.

    Keys are converted by diffusers (`lora_state_dict`), so diffusers', PEFT's and kohya's spellings are understood.

    Args:
        file: What was read.
        pipe: A diffusers pipeline.

    Raises:
        LoraError: If no layer of the UNet matches, or a matching layer has another shape.
    """
    try:
        tensors, alphas = _diffusers_keys(file, pipe)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise LoraError(f"{file.path.name}: the names of its layers are not understood: {error}") from error
    adapter = _adapter_config(file)
    if any(value for key, value in adapter.items() if key.endswith("use_dora")):
        raise LoraError(f"{file.path.name} is a DoRA; only plain LoRA and LoCon factors are supported so far")
    unmatched: list[str] = []
    parts = {}
    for part in ("unet", *TEXT_ENCODERS):
        mine = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        scales = {k.removeprefix(f"{part}."): v for k, v in alphas.items() if k.startswith(f"{part}.")}
        config = {k.removeprefix(f"{part}."): v for k, v in adapter.items() if k.startswith(f"{part}.")}
        model = getattr(pipe, part, None)
        parts[part] = _factors(file, part, model, mine, scales, config, unmatched) if mine else {}
    if not parts["unet"] and not any(parts[part] for part in TEXT_ENCODERS):
        raise LoraError(
            f"{file.path.name} matches no layer of this model; its first keys are "
            f"{', '.join(list(file.tensors)[:3])}. Is it for another architecture?"
        )
    text = {part: parts[part] for part in TEXT_ENCODERS if parts[part]}
    return Factors(parts["unet"], text, tuple(unmatched))


def _adapter_config(file: LoraFile) -> dict[str, Any]:
    """PEFT's configuration, which diffusers writes into the header under keys that start with the component's name."""
    try:
        config = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise LoraError(f"{file.path.name}: lora_adapter_metadata is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise LoraError(f"{file.path.name}: lora_adapter_metadata is {config!r}; expected settings by name")
    return config


def _diffusers_keys(file: LoraFile, pipe: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and alphas under keys that start with the component's name."""
    tensors, alphas = pipe.lora_state_dict(dict(file.tensors), unet_config=pipe.unet.config)
    alphas = {key: float(value) for key, value in (alphas or {}).items()}
    named = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("base_model.model.")
        if not key.startswith(("unet.", *(f"{part}." for part in TEXT_ENCODERS))):
            key = f"unet.{key}"
        if key.endswith(".alpha"):
            alphas[key] = float(tensor)
        else:
            named[key] = tensor
    return named, alphas


def _factors(
    file: LoraFile,
    part: str,
    model: nn.Module | None,
    tensors: dict[str, Tensor],
    alphas: dict[str, float],
    config: dict[str, Any],
    unmatched: list[str],
) -> Lora:
    """The factors for one model; keys that fit none of its layers are added to `unmatched`."""
    if model is None:
        unmatched += [f"{part}.{key}" for key in tensors]
        return {}
    model = uncompiled(model)
    try:
        tensors, alphas = _peft_keys(part, model, tensors), _peft_keys(part, model, alphas)
    except ValueError as error:
        raise LoraError(f"{file.path.name}: the names of its {part} layers are not understood: {error}") from error
    alphas = {re.sub(r"(\.lora_A\.weight)?\.alpha$", "", key): value for key, value in alphas.items()}
    where = places(model) if part == "unet" else dict(model.named_modules())
    factors = {}
    for name, sides in _by_layer(file, part, tensors, unmatched).items():
        if name not in where:
            unmatched.append(f"{part}.{name}")
            continue
        if sides.keys() != {"A", "B"}:
            raise LoraError(f"{file.path.name}: {part}.{name} has only one of its two factors; the file is incomplete")
        try:
            check_factors(model, name, sides["A"].shape, sides["B"].shape)
        except ValueError as error:
            raise LoraError(f"{file.path.name} does not fit this model: {part}.{error}") from error
        try:
            scale = _scale(name, sides["A"].shape[0], alphas, config)
        except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
            raise LoraError(f"{file.path.name}: lora_adapter_metadata gives {name} no alpha: {error}") from error
        factors[name] = LoraFactors(sides["A"], sides["B"], scale)
    return factors


def _by_layer(
    file: LoraFile, part: str, tensors: dict[str, Tensor], unmatched: list[str]
) -> dict[str, dict[str, Tensor]]:
    """The two factors "A" and "B" of every layer, from PEFT's keys."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", key):
            sides = layers.setdefault(found[1], {})
            if found[2] in sides:
                raise LoraError(f"{file.path.name} has more than one LoRA for {part}.{found[1]}; expected one adapter")
            sides[found[2]] = tensor
        else:
            unmatched.append(f"{part}.{key}")
    return layers


def _peft_keys(part: str, model: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """The same values under PEFT's spelling of the keys, as diffusers converts them."""
    if part == "unet":
        return convert_unet_state_dict_to_peft(values)
    converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(values)) if values else values
    if not hasattr(model, "text_model"):  # transformers 5 has flattened CLIPTextModel
        converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    return converted


def _scale(name: str, rank: int, alphas: dict[str, Any], config: dict[str, Any]) -> float:
    """Alpha / rank; alpha from the file's alpha keys, else from PEFT's configuration, else the rank."""
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    configured = patterns.get(get_pattern_key(list(patterns), name), config.get("lora_alpha", rank))
    alpha = float(alphas.get(name, configured))
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def adapter_factors(pipe: Any, adapter: str) -> Factors:
    """The factors of an adapter that the user has loaded with `load_lora_weights`, at the scale PEFT gives it.

    Raises:
        LoraError: If it is no plain LoRA or is fused into the weights.
    """
    parts = {part: _adapter_layers(getattr(pipe, part, None), adapter) for part in ("unet", *TEXT_ENCODERS)}
    return Factors(parts["unet"], {part: parts[part] for part in TEXT_ENCODERS if parts[part]})


def _adapter_layers(model: nn.Module | None, adapter: str) -> Lora:
    layers = {}
    for name, module in uncompiled(model).named_modules() if model is not None else ():
        if not isinstance(module, BaseTunerLayer) or adapter not in _adapter_names(module):
            continue
        if not isinstance(module, LoraLayer) or adapter in module.lora_variant or module.lora_bias[adapter]:
            raise LoraError(
                f"adapter {adapter!r} is no plain LoRA at {name} (DoRA, LoKr or with a bias), which is not supported"
            )
        if adapter in module.merged_adapters:
            raise LoraError(f"adapter {adapter!r} is fused into the weights; call `unfuse_lora()` first")
        down, up = (_real_weight(side[adapter]) for side in (module.lora_A, module.lora_B))
        layers[name] = LoraFactors(down, up, float(module.scaling[adapter]))
    return layers


def _adapter_names(module: BaseTunerLayer) -> set[str]:
    return {name for attribute in module.adapter_layer_names for name in getattr(module, attribute, ())}


def _real_weight(module: nn.Module) -> Tensor:
    """A weight, also under sequential offload, which keeps the numbers beside the module."""
    weight = module.get_parameter("weight")
    return (getattr(module, "_hf_hook").weights_map["weight"] if weight.is_meta else weight).detach()  # noqa: B009
