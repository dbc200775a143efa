"""The playground's transformer as a node of ComfyUI: core's own Flux class and samplers, with real images.

Core's loaders do not take it, nor the playground's UNet: they know models by the sizes of published ones, tokenizers
are core's own files, and UNet and VAE have 32 groups in every normalisation, whatever their width.
"""

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats  # pyright: ignore[reportMissingImports]
import comfy.model_detection  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.sd1_clip  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]
import torch
from comfy.ldm.flux.model import FluxParams  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

WORLD = Path(__file__).resolve().parents[1] / "assets/playground-flux/model"
CPU = torch.device("cpu")


def patcher() -> Any:
    """The transformer."""
    theirs, vae = (json.loads((WORLD / part / "config.json").read_text()) for part in ("transformer", "vae"))
    heads, channels = theirs["num_attention_heads"], theirs["in_channels"] // 4
    config = {
        "image_model": "flux", "in_channels": channels, "out_channels": channels, "patch_size": 2, "num_heads": heads,
        "vec_in_dim": theirs["pooled_projection_dim"], "context_in_dim": theirs["joint_attention_dim"],
        "hidden_size": heads * theirs["attention_head_dim"], "axes_dim": theirs["axes_dims_rope"], "mlp_ratio": 4.0,
        "depth": theirs["num_layers"], "depth_single_blocks": theirs["num_single_layers"], "theta": 10000,
        "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
    }  # fmt: skip
    if "txt_ids_dims" not in FluxParams.__dataclass_fields__:  # of older versions
        del config["txt_ids_dims"]
    family = comfy.supported_models.FluxSchnell(config)
    family.latent_format = comfy.latent_formats.LatentFormat()
    family.latent_format.latent_channels = channels
    family.latent_format.scale_factor = vae["scaling_factor"]
    family.set_inference_dtype(torch.float32, None)
    model = family.get_model({}, "")
    weights = load_file(WORLD / "transformer/diffusion_pytorch_model.safetensors")
    model.diffusion_model.load_state_dict(comfy.model_detection.convert_diffusers_mmdit(weights))
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def longest(part: str) -> int:
    """How many tokens a text may have."""
    return json.loads((WORLD / part / "tokenizer_config.json").read_text())["model_max_length"]


class Tokenizer:
    """CLIP's and T5's, as core's of FLUX.1 are put together."""

    def __init__(self) -> None:
        options = {"embedding_key": "t5xxl", "has_start_token": False, "pad_with_end": False}
        self.clip_l = comfy.sd1_clip.SDTokenizer(str(WORLD / "tokenizer"), max_length=longest("tokenizer"))
        self.t5xxl = comfy.sd1_clip.SDTokenizer(
            str(WORLD / "tokenizer_2"), max_length=longest("tokenizer_2"), tokenizer_class=T5TokenizerFast, **options
        )

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        each = {"l": self.clip_l, "t5xxl": self.t5xxl}
        return {name: one.tokenize_with_weights(text, return_word_ids) for name, one in each.items()}


class Clip:
    """Both text encoders."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.clip = CLIPTextModel.from_pretrained(WORLD / "text_encoder", torch_dtype=torch.float32)
        self.t5 = T5EncoderModel.from_pretrained(WORLD / "text_encoder_2", torch_dtype=torch.float32)

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[list[Any]]:
        clip, t5 = (torch.tensor([[one[0] for part in tokens[name] for one in part]]) for name in ("l", "t5xxl"))
        text, pooled = self.t5(t5).last_hidden_state, self.clip(clip).pooler_output
        return [[text, {"pooled_output": pooled}]]


class Vae:
    """Images and latents."""

    def __init__(self) -> None:
        self.vae: Any = AutoencoderKL.from_pretrained(WORLD / "vae", torch_dtype=torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Images with values in 0..1. Shape: [images, height, width, 3]."""
        return (self.vae.decode(latents.float()).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def encode(self, images: Tensor) -> Tensor:
        """Latents. Shape of the images: [images, height, width, 3], in 0..1."""
        return self.vae.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode()


class SmallWorldNode(io.ComfyNode):
    """Loads all of it."""

    @classmethod
    def define_schema(cls) -> Any:
        outputs = [io.Model.Output(), io.Clip.Output(), io.Vae.Output()]
        return io.Schema(
            node_id="SmallWorld", display_name="Small world", category="loaders", inputs=[], outputs=outputs
        )

    @classmethod
    def execute(cls) -> Any:
        return io.NodeOutput(patcher(), Clip(), Vae())


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [SmallWorldNode]


async def comfy_entrypoint() -> Extension:
    return Extension()
