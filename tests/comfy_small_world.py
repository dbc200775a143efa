"""The playground as a node of ComfyUI: core's own UNet class and samplers, with real images.

Core's loaders do not take it: they know models by the sizes of published ones, their UNets and VAEs have 32 groups in
every normalisation, and tokenizers are core's own files.
"""

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats  # pyright: ignore[reportMissingImports]
import comfy.model_base  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.ops  # pyright: ignore[reportMissingImports]
import comfy.sd1_clip  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]
import comfy.utils  # pyright: ignore[reportMissingImports]
import torch
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

WORLD = Path(__file__).resolve().parents[1] / "assets/playground/model"
CPU = torch.device("cpu")


def config_of(part: str) -> dict[str, Any]:
    (path,) = (WORLD / part).glob("*config.json")
    return json.loads(path.read_text(encoding="utf-8"))


GROUPS = {32: config_of("unet")["norm_num_groups"]}
"""Normalisations by core's number."""


class Layers(comfy.ops.disable_weight_init):
    """Core's layers, with the groups of the small world in normalisations."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups: int, *arguments: Any, **options: Any) -> None:
            super().__init__(GROUPS.get(num_groups, num_groups), *arguments, **options)


def patcher() -> Any:
    """The UNet."""
    theirs, vae, scheduler = (config_of(part) for part in ("unet", "vae", "scheduler"))
    widths, blocks = theirs["block_out_channels"], theirs["layers_per_block"]
    down, up = (["CrossAttn" in kind for kind in theirs[f"{side}_block_types"]] for side in ("down", "up"))
    config: dict[str, Any] = {
        "image_size": 32, "in_channels": theirs["in_channels"], "out_channels": theirs["out_channels"],
        "model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths), "transformer_depth_middle": 1, "use_spatial_transformer": True,
        "transformer_depth": [int(attends) for attends in down for _ in range(blocks)],
        # Core takes these from the end.
        "transformer_depth_output": [int(attends) for attends in reversed(up) for _ in range(blocks + 1)],
        "context_dim": theirs["cross_attention_dim"], "use_linear_in_transformer": theirs["use_linear_projection"],
        "legacy": False, "use_temporal_attention": False, "adm_in_channels": None,
    }  # fmt: skip
    family = comfy.supported_models.SD15({**config})
    family.unet_config |= {"num_heads": -1, "num_head_channels": widths[0] // theirs["attention_head_dim"][0]}
    family.custom_operations = Layers
    family.sampling_settings = {"zsnr": scheduler["rescale_betas_zero_snr"]}
    family.latent_format = comfy.latent_formats.LatentFormat()
    family.latent_format.latent_channels = theirs["in_channels"]
    family.latent_format.scale_factor = vae["scaling_factor"]
    family.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(family, comfy.model_base.ModelType.V_PREDICTION, device=CPU)
    weights = load_file(WORLD / "unet/diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(config)
    model.diffusion_model.load_state_dict({names[key]: weight.float() for key, weight in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


class Tokenizer:
    """CLIP's."""

    def __init__(self) -> None:
        longest = config_of("tokenizer")["model_max_length"]
        self.clip_l = comfy.sd1_clip.SDTokenizer(str(WORLD / "tokenizer"), max_length=longest)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        return {"l": self.clip_l.tokenize_with_weights(text, return_word_ids)}


class Clip:
    """The text encoder."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.clip = CLIPTextModel.from_pretrained(WORLD / "text_encoder", torch_dtype=torch.float32)

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[list[Any]]:
        read = torch.tensor([[token[0] for part in tokens["l"] for token in part]])
        return [[self.clip(read).last_hidden_state, {}]]


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
