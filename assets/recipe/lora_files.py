"""One LoRA in the formats of many trainers, to compare the results of reading them.

Names and tensors follow what those trainers write (sources: `tests/fixtures/lora_layouts`). Nothing is shared with
`pipelines.formats`, which reads them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_compose.attention import Lora, LoraFactors, backbone_of

Tensors = dict[str, Tensor]
Loras = Mapping[str, Lora]
"""By component of a pipeline ("unet", "text_encoder", "text_encoder_2"), the factors of its layers; all of one rank."""

_TARA_ALPHA = 32.0  # of the authors' script, which does not save it


# Spellings: a pipeline, a part of it and a layer -> what the layer is called in the file.


def dotted(pipe: Any, part: str, name: str) -> str:
    """As diffusers has it, with the part in front."""
    return f"{part}.{name if part == 'unet' else _in_text_model(name)}"


def before_peft(pipe: Any, part: str, name: str) -> str:
    """As diffusers had it before PEFT."""
    return f"{dotted(pipe, part, name)}.{'lora' if part == 'unet' else 'lora_linear_layer'}"


def kohya(pipe: Any, part: str, name: str) -> str:
    """As sd-scripts has it, with diffusers' names of blocks."""
    number = {"text_encoder": "1", "text_encoder_2": "2"}.get(part, "") if _has_two_encoders(pipe) else ""
    start = "lora_unet" if part == "unet" else f"lora_te{number}"
    return f"{start}_{name if part == 'unet' else _in_text_model(name)}".replace(".", "_")


def kohya_original(pipe: Any, part: str, name: str) -> str:
    """As sd-scripts has it, with the names of blocks of the original checkpoints: LDM's for SD, SGM's for SDXL."""
    return kohya(pipe, part, _original(pipe.unet.config, name) if part == "unet" else name)


def comfy(pipe: Any, part: str, name: str) -> str:
    """As ComfyUI has it: the original checkpoint's names, with dots."""
    if part == "unet":
        return f"diffusion_model.{_original(pipe.unet.config, name)}"
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
    return f"text_encoders.{clip}.transformer.{_in_text_model(name)}"


def peft(pipe: Any, part: str, name: str) -> str:
    """As PEFT saves one model."""
    return f"base_model.model.{name}"


def bare(pipe: Any, part: str, name: str) -> str:
    """As one model saves itself."""
    return name


def processor(pipe: Any, part: str, name: str) -> str:
    """As early diffusers had it: factors belong to the processor of an attention layer."""
    attention, _, projection = name.removesuffix(".0").rpartition(".")
    if part == "unet":
        return f"unet.{attention}.processor.{projection}"
    return f"{part}.{_in_text_model(attention)}.to_{projection.removesuffix('_proj')}"


def _in_text_model(name: str) -> str:
    return f"text_model.{name.removeprefix('text_model.')}"  # transformers 5 has lost this name


def _has_two_encoders(pipe: Any) -> bool:
    return getattr(pipe, "text_encoder_2", None) is not None


def _original(config: Any, name: str) -> str:
    """A layer of a UNet in the original checkpoint, whose blocks are numbered through in each direction."""
    for outside, theirs in _OUTSIDE.items():
        if name == outside:
            return theirs
    found = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if found is None:
        raise ValueError(f"the original checkpoints have no name for {name!r}")
    direction, kind, inner = found[1], found[3], found[5]
    block, place, each = int(found[2] or 0), int(found[4]), config["layers_per_block"] + 1
    if kind == "downsamplers":
        return f"input_blocks.{each * (block + 1)}.0.op"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{each * block + each - 1}.{after}.conv"
    inner = _RESNET.get(inner, inner)
    if direction == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{inner}"
    number = (
        f"input_blocks.{each * block + place + 1}" if direction == "down" else f"output_blocks.{each * block + place}"
    )
    return f"{number}.{1 if kind == 'attentions' else 0}.{inner}"


_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


# Tensors: the factors of a layer -> what the file has of it, by what stands after the layer's name.


def pair(down: str, up: str, share: float = 1.0) -> Callable[[LoraFactors], Tensors]:
    """Two factors, scaled by a share; alpha makes up for it."""
    return lambda lora: {down: share * lora.scale * lora.down, up: lora.up}


def with_alpha(lora: LoraFactors) -> Tensors:
    """Half of the factors, and twice the rank for an alpha."""
    return {
        ".lora_down.weight": lora.scale * lora.down / 2,
        ".lora_up.weight": lora.up,
        ".alpha": torch.tensor(2.0 * lora.rank),
    }


def tara(lora: LoraFactors) -> Tensors:
    """Factors that act as wanted once alpha is given."""
    return pair(".lora_layer.down.weight", ".lora_layer.up.weight", lora.rank / _TARA_ALPHA)(lora)


def locon_tucker(lora: LoraFactors) -> Tensors:
    """The factors of a larger convolution in three: the first hands every input on."""
    if lora.down.ndim == 2 or lora.down.shape[2:] == (1, 1):
        return with_alpha(lora)
    inputs = lora.down.shape[1]
    return {
        ".lora_down.weight": torch.eye(inputs)[:, :, None, None],
        ".lora_mid.weight": lora.scale * lora.down,
        ".lora_up.weight": lora.up,
        ".alpha": torch.tensor(float(inputs)),
    }


def loha(lora: LoraFactors) -> Tensors:
    """Times ones, which are of rank one."""
    up, down = lora.up.flatten(1), lora.scale * lora.down
    if down.ndim == 4:  # the core has the factors, and an identity stands for the inputs
        inputs, ones = down.shape[1], torch.ones(1, 1, *down.shape[2:])
        return {
            ".hada_t1": down, ".hada_w1_a": up.T, ".hada_w1_b": torch.eye(inputs),
            ".hada_t2": ones, ".hada_w2_a": torch.ones(1, len(up)), ".hada_w2_b": torch.ones(1, inputs),
        }  # fmt: skip
    return {
        ".hada_w1_a": up / 2, ".hada_w1_b": down,
        ".hada_w2_a": torch.ones(len(up), 1), ".hada_w2_b": torch.ones(1, down.shape[1]),
        ".alpha": torch.tensor(2.0 * lora.rank),
    }  # fmt: skip


def lokr(lora: LoraFactors) -> Tensors:
    """A number times the change, in factors; of a convolution, times the change as a whole."""
    small = torch.tensor([[4.0]])
    if lora.down.ndim == 4:
        return {".lokr_w1": small, ".lokr_w2": lora.delta() / 4, ".alpha": torch.tensor(99.0)}  # which has no meaning
    up, down = lora.up / 8, lora.scale * lora.down
    return {".lokr_w1": small, ".lokr_w2_a": up, ".lokr_w2_b": down, ".alpha": torch.tensor(2.0 * lora.rank)}


def difference(lora: LoraFactors) -> Tensors:
    """The change itself."""
    return {".diff": lora.delta()}


# Files: tensors, the LoRA and its pipeline, a folder -> the file.


def safetensors(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """Tensors alone."""
    return _saved(tensors, folder / "lora.safetensors")


def with_header(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """With PEFT's settings in the header, as diffusers writes them by part."""
    settings = {f"{part}.{key}": value for part in loras for key, value in _settings(loras).items()}
    return _saved(tensors, folder / "lora.safetensors", lora_adapter_metadata=json.dumps(settings))


def with_neighbour(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """With PEFT's settings beside it, as PEFT writes them."""
    (folder / "adapter_config.json").write_text(json.dumps(_settings(loras)), encoding="utf-8")
    return _saved(tensors, folder / "adapter_model.safetensors")


def whole_unet(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """Among all weights of the UNet."""
    return _saved({**pipe.unet.state_dict(), **tensors}, folder / "diffusion_pytorch_model.safetensors")


def with_words(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """With a word of its own."""
    return _saved({"new_concept_embedding.<it>": _word(pipe), **tensors}, folder / "edlora.safetensors")


def pickled(tensors: Tensors, loras: Loras, pipe: Any, folder: Path) -> Path:
    """With a word of its own, by `torch.save`: dictionaries by part."""
    params: dict[str, Tensors] = {"new_concept_embedding": {"<it>": _word(pipe)}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        params.setdefault(part, {})[name] = tensor
    torch.save({"params": params}, folder / "edlora.pth")
    return folder / "edlora.pth"


def _saved(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt", **metadata})
    return path


def _settings(loras: Loras) -> dict[str, Any]:
    (rank,) = {factors.rank for lora in loras.values() for factors in lora.values()}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}


def _word(pipe: Any) -> Tensor:
    layers = backbone_of(pipe.unet).text_layers
    return torch.zeros(layers, pipe.text_encoder.config.hidden_size)


# What a file may hold: a part and a layer -> whether it can be there.


def everything(part: str, name: str) -> bool:
    """All layers."""
    return True


def unet_alone(part: str, name: str) -> bool:
    """One model."""
    return part == "unet"


def attention_alone(part: str, name: str) -> bool:
    """Attention layers of all models."""
    return re.search(r"\.attn[12]\.to_|\.self_attn\.", name) is not None


@dataclass(frozen=True)
class Format:
    """How a LoRA becomes a file.

    Attributes:
        spelled: The name of a layer in the file.
        tensors: The tensors of a layer.
        save: Writes the file.
        holds: Whether the format supports a layer, by part and name.
        options: Arguments that `load_concept` needs.
    """

    spelled: Callable[[Any, str, str], str]
    tensors: Callable[[LoraFactors], Tensors]
    save: Callable[[Tensors, Loras, Any, Path], Path] = safetensors
    holds: Callable[[str, str], bool] = everything
    options: Mapping[str, Any] = field(default_factory=dict)

    def held(self, loras: Loras) -> dict[str, Lora]:
        """The part of a LoRA that the format supports."""
        kept = {part: {n: f for n, f in lora.items() if self.holds(part, n)} for part, lora in loras.items()}
        return {part: lora for part, lora in kept.items() if lora}

    def write(self, loras: Loras, pipe: Any, folder: Path) -> Path:
        """Writes a LoRA into a folder.

        Args:
            loras: For a pipeline.
            pipe: That pipeline, or anything with such a UNet and text encoders.
            folder: An empty folder.
        """
        held = self.held(loras)
        tensors = {
            f"{self.spelled(pipe, part, name)}{suffix}": tensor.clone()
            for part, lora in held.items()
            for name, factors in lora.items()
            for suffix, tensor in self.tensors(factors).items()
        }
        return self.save(tensors, held, pipe, folder)


DIFFUSERS = Format(dotted, pair(".lora_A.weight", ".lora_B.weight"))

FORMATS: Mapping[str, Format] = {
    "diffusers": Format(dotted, pair(".lora_A.weight", ".lora_B.weight", 1 / 2), with_header),
    "diffusers, old": Format(before_peft, pair(".down.weight", ".up.weight")),
    "attention processors": Format(processor, pair("_lora.down.weight", "_lora.up.weight"), holds=attention_alone),
    "PEFT": Format(peft, pair(".lora_A.weight", ".lora_B.weight", 1 / 2), with_neighbour, unet_alone),
    "kohya": Format(kohya, with_alpha),
    "kohya, LDM blocks": Format(kohya_original, with_alpha),
    "ComfyUI": Format(comfy, with_alpha),
    "TARA, whole UNet": Format(bare, tara, whole_unet, unet_alone, {"alpha": _TARA_ALPHA}),
    "ED-LoRA, pickled": Format(
        dotted, pair("_lora.down.weight", "_lora.up.weight"), pickled, options={"allow_pickle": True}
    ),
    "ED-LoRA, newer": Format(dotted, pair(".lora_down.weight", ".lora_up.weight"), with_words),
    "LoCon, Tucker": Format(kohya, locon_tucker),
    "LoHa": Format(kohya, loha),
    "LoKr": Format(kohya, lokr),
    "whole differences": Format(kohya, difference),
}
"""By name, in the order of `docs/lora-files.md`."""
