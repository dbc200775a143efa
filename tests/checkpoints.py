"""Checkpoints in one file, in the original layout: `from checkpoints import write_checkpoint`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip


VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
}  # fmt: skip


OPEN_CLIP = {
    "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
    "text_model.encoder.layers": "transformer.resblocks", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
}  # fmt: skip


def original_unet_names(unet: Any) -> dict[str, str]:
    """What Stable Diffusion's own code calls the parts of a UNet with levels of two layers."""
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    for i, up in enumerate(unet.up_blocks):
        for j in range(3):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{2 if hasattr(up, 'attentions') else 1}"
    return names


def renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", key)
    return key


def write_checkpoint(pipe: Any, path: Path) -> Path:
    """Writes the models of a pipeline as one file in the original layout."""
    tensors = {}
    for key, tensor in pipe.unet.state_dict().items():
        name = renamed(key, original_unet_names(pipe.unet))
        tensors["model.diffusion_model." + (renamed(name, RESNET) if ".resnets." in key else name)] = tensor
    for key, tensor in pipe.vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", key.replace("down_blocks", "down"))
        convolution = ".attentions." in key and "group_norm" not in key and tensor.ndim == 2
        tensors["first_stage_model." + renamed(name, VAE)] = tensor[..., None, None] if convolution else tensor
    xl = hasattr(pipe, "text_encoder_2")
    first = "conditioner.embedders.0." if xl else "cond_stage_model."
    for key, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"{first}transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if xl:
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipe.text_encoder_2).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """The weights of a text encoder as OpenCLIP has them: one matrix for queries, keys and values."""
    weights = encoder.state_dict()
    tensors = {
        renamed(key, OPEN_CLIP): tensor for key, tensor in weights.items() if not re.search(r"\.[qkv]_proj\.", key)
    }
    tensors["text_projection"] = tensors.pop("text_projection.weight").T
    tensors["positional_embedding"] = tensors.pop("text_model.embeddings.position_embedding.weight")
    for i in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            three = [weights[f"text_model.encoder.layers.{i}.self_attn.{side}_proj.{kind}"] for side in "qkv"]
            tensors[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(three)
    return tensors


def write_gguf(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a transformer's tensors as GGUF: weights of linear layers in Q8_0 where they fit. Needs the package."""
    import gguf  # pyright: ignore[reportMissingImports]

    writer, kinds = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType
    for name, tensor in tensors.items():
        fits = name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        kind = kinds.Q8_0 if fits else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
