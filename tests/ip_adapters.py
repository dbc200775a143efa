"""Small IP-Adapters of random numbers, with a real CLIP image encoder, in the layout of published files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from components import activated, seeded
from lora_compose import ComposePipeline
from lora_compose.compose.playground.assets import playground_model
from small_world import SIZE

TOKENS, WIDTH = 4, 12  # of an image


def image_encoder() -> CLIPVisionModelWithProjection:
    """A CLIP image encoder of two layers."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def ip_adapter(unet: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter as its file has it: a projection of the image, and keys and values for each cross-attention."""
    generator, text = seeded(seed), unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(TOKENS * text, WIDTH, generator=generator),
        "proj.bias": torch.randn(TOKENS * text, generator=generator),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    attention = {}
    for index, name in enumerate(layers):
        outputs = unet.get_submodule(f"{name.removesuffix('.processor')}.to_k").out_features
        for side in ("k", "v"):
            weight = torch.randn(outputs, text, generator=generator) * text**-0.5 * 2
            attention[f"{2 * index + 1}.to_{side}_ip.weight"] = weight
    return {"image_proj": projection, "ip_adapter": attention}


def with_ip_adapters(pipe: Any, count: int = 1, scale: Any = 0.7) -> Any:
    """The pipeline with so many IP-Adapters."""
    pipe.register_modules(
        image_encoder=image_encoder(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    files = [ip_adapter(pipe.unet, seed) for seed in range(count)]
    pipe.load_ip_adapter(files, subfolder=[""] * count, weight_name=[""] * count)
    pipe.set_ip_adapter_scale([scale] * count)
    return pipe


def playground_guides(folder: Path) -> Path:
    """A folder with a ControlNet, an IP-Adapter and images, for the playground."""
    unet = ComposePipeline.from_pretrained(playground_model()).unet
    torch.manual_seed(0)
    activated(ControlNetModel.from_unet(unet), size=0.3).save_pretrained(folder / "pose")
    parts = ip_adapter(unet)
    tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    (folder / "faces").mkdir()
    save_file(tensors, folder / "faces" / "adapter.safetensors")
    image_encoder().save_pretrained(folder / "faces" / "image_encoder")
    for seed, name in enumerate(("pose", "face")):
        pixels = (np.random.default_rng(seed).random((SIZE, SIZE, 3)) * 255).astype("u1")
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder
