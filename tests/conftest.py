"""Small real components, and the playground. Everything runs offline on the CPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attention import Lora, LoraFactors
from compose.assets import playground_lora, playground_model
from pipelines.stable_diffusion import ComposeStableDiffusionPipeline

torch.set_num_threads(1)
diffusers_logging.disable_progress_bar()

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv", "conv_shortcut",
              "time_emb_proj", "conv_in", "conv_out", "time_embedding.linear_1")  # fmt: skip


def sd_unet(**changes) -> UNet2DConditionModel:
    """SD1.5's block structure (three attention levels of two layers, convolutional projections) with few channels."""
    torch.manual_seed(0)
    config = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**config | changes).eval()


def sdxl_unet(**changes) -> UNet2DConditionModel:
    """SDXL's block structure (0, 2 and 10 transformer layers, linear projections, added conditions), few channels."""
    torch.manual_seed(0)
    config = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    return UNet2DConditionModel(**config | changes).eval()


def random_lora(
    model: nn.Module, seed: int, *, rank: int = 3, scale: float = 1.0, targets: tuple[str, ...] = ATTENTION, size: float = 0.3
) -> Lora:
    """Factors for every layer whose name ends with one of the targets; the delta is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not any(f".{name}".endswith(f".{t}") for t in targets):
            continue
        out, *inputs = module.weight.shape
        up_shape = (out, rank, 1, 1) if isinstance(module, nn.Conv2d) else (out, rank)
        down = torch.randn(rank, *inputs, generator=generator) * size
        factors[name] = LoraFactors(down, torch.randn(up_shape, generator=generator) * size, scale)
    return factors


def small_pipeline(cls=ComposeStableDiffusionPipeline, unet: UNet2DConditionModel | None = None):
    """A Stable Diffusion pipeline of small real components with the playground's tokenizer (32 tokens)."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(playground_model() / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, sample_size=128,
    )  # fmt: skip
    return cls(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet or sd_unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def pipe() -> ComposeStableDiffusionPipeline:
    """A small pipeline with random weights, new for every test."""
    pipe = small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def write_lora(tmp_path: Path) -> Callable[..., Path]:
    """Writes factors as a LoRA file in diffusers' format: `write_lora(name, unet=..., text_encoder=..., metadata=...)`."""
    from safetensors.torch import save_file

    def write(name: str, metadata: dict[str, str] | None = None, **parts: Lora) -> Path:
        tensors = {}
        for part, lora in parts.items():
            for layer, factors in lora.items():
                tensors[f"{part}.{layer}.lora_A.weight"] = (factors.down * factors.scale).contiguous()
                tensors[f"{part}.{layer}.lora_B.weight"] = factors.up.contiguous()
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        return path

    return write


@pytest.fixture(scope="session")
def _playground() -> ComposeStableDiffusionPipeline:
    pipe = ComposeStableDiffusionPipeline.from_pretrained(playground_model())
    pipe.set_progress_bar_config(disable=True)
    for name in ("cat", "dog", "bear", "robot"):
        pipe.load_concept(playground_lora(f"{name}-tara"), name=name)
        pipe.load_concept(playground_lora(name), name=f"{name}-ordinary")
    return pipe


@pytest.fixture
def playground(_playground: ComposeStableDiffusionPipeline) -> Iterator[ComposeStableDiffusionPipeline]:
    """The playground with TARA LoRAs "cat", "dog", "bear", "robot" and ordinary ones "cat-ordinary", ..., shared."""
    names = list(_playground.concepts)
    scheduler = _playground.scheduler
    yield _playground
    _playground.scheduler = scheduler
    for name in _playground.concepts.keys() - set(names):
        _playground.unload_concept(name)


@pytest.fixture
def plain_pipe() -> StableDiffusionPipeline:
    """diffusers' own pipeline with the same weights as `pipe`."""
    pipe = small_pipeline(StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe
