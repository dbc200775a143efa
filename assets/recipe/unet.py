"""The UNet and its text encoder, trained together on latents of the small world.

    PYTHONPATH=assets python -m recipe.unet POOL MODEL --vae VAE --tokenizer TOKENIZER --minutes 480

A checkpoint next to OUT is resumed; minutes are of computing, in all. Close-ups are most of the batches at first and
fewer and fewer of them later. The UNet predicts v (Salimans & Ho 2022); the last noise level has no signal (Lin et al.
2023), or large objects would be decided by accidents of the noise; the loss is weighted by the signal-to-noise ratio
(Hang et al. 2023); features of the middle block are to tell what lies where (`hints.py`); the average of the last
weights is saved.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import handle_errors
from recipe.averaged import NO_CAPTION, AveragedTrainer
from recipe.clock import train_for
from recipe.hints import Hints, lying
from recipe.pool import Batch
from recipe.ranks import start_ranks
from recipe.world import SIZE

WIDTH = 192
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
LAYOUT_FROM = 650
"""Times from which on it is decided what is where; half of a batch has such a time."""
SNR_LIMIT = 5.0
SIDE = 2
"""Patches along a side of what one position of the middle block covers."""


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder."""
    tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH, **tokens,
    )  # fmt: skip
    return CLIPTextModel(config)


def new_unet(channels: int) -> UNet2DConditionModel:
    """An untrained UNet; `attention_head_dim` is the number of heads, as in Stable Diffusion 1.x."""
    heads: Any = (2, 4, 6)
    return UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=channels, out_channels=channels, block_out_channels=(96, 192, 288),
        layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=heads,
        norm_num_groups=16,
    )  # fmt: skip


def new_pipeline(vae: Path, words: Path) -> StableDiffusionPipeline:
    """An untrained model around a VAE and a tokenizer."""
    coder = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(words)
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    parts: dict[str, Any] = {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(
        vae=coder, text_encoder=new_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=new_unet(coder.config["latent_channels"]), requires_safety_checker=False, **parts,
    )  # fmt: skip


class UNetTrainer(AveragedTrainer[Batch]):
    """Trains text encoder and UNet.

    Args:
        pipe: The pipeline, trained in place.
        lr: Learning rate of Muon, for matrices and convolutions; AdamW has a tenth of it for the rest.
        seed: Seed of noise, times and dropped captions.
    """

    # Not compiled: with PyTorch 2.13 on a CPU, in bf16, upsampling in a compiled UNet hands back no gradient, so that
    # everything below its highest resolution stays as it was.
    def __init__(self, pipe: StableDiffusionPipeline, lr: float, seed: int) -> None:
        self.hints = Hints(pipe.unet.config["block_out_channels"][-1], patches=SIDE**2)
        super().__init__([pipe.unet, pipe.text_encoder, self.hints], _is_inner, lr, seed)
        self.pipe = pipe
        self.unet: Any = pipe.unet
        self.unet.mid_block.register_forward_hook(self._keep_middle)
        self.unet.set_attn_processor(AttnProcessor())  # on a CPU faster than fused kernels for heads this narrow
        self.text_encoder: Any = pipe.text_encoder
        self.schedule = DDPMScheduler(**NOISE)
        self._no_words = self._ids([""])[0]

    def _ids(self, captions: list[str]) -> Tensor:
        tokens: Any = self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids

    def _keep_middle(self, _block: Any, _inputs: Any, features: Tensor) -> None:
        self._middle = features

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of v, and that of what lies where."""
        x, ids, rng = batch.latents, self._ids(batch.captions), self.generator
        ids[torch.rand(len(ids), generator=rng) < NO_CAPTION] = self._no_words
        noise = torch.randn(x.shape, generator=rng)
        t = torch.randint(0, 1000, (len(x),), generator=rng)
        t[::2] = torch.randint(LAYOUT_FROM, 1000, t[::2].shape, generator=rng)
        noisy: Any = self.schedule.add_noise(x, noise, t)  # type: ignore[arg-type]
        with cpu_autocast():
            predicted = self.unet(noisy, t, self.text_encoder(ids)[0]).sample
        velocity = self.schedule.get_velocity(x, noise, t)  # type: ignore[arg-type]
        snr = self.schedule.alphas_cumprod[t] / (1 - self.schedule.alphas_cumprod[t])
        weight = snr.clamp(max=SNR_LIMIT) / (snr + 1) + 0.5
        error = ((predicted.float() - velocity).pow(2) * weight.view(-1, 1, 1, 1)).mean()
        return error + self.hints(self._middle.flatten(2).transpose(1, 2), *self._patches(batch.objects))

    def _patches(self, objects: Tensor) -> tuple[Tensor, Tensor]:
        """What lies on each patch, those of a position of the middle block one after the other."""
        height, width = self._middle.shape[2:]
        of_all = lying(objects, SIDE * height, SIDE * width)
        grid = torch.arange(SIDE * height * SIDE * width).view(height, SIDE, width, SIDE).transpose(1, 2).flatten()
        return of_all[0][:, grid], of_all[1][:, grid]

    def save(self, out: Path) -> None:
        """Writes the pipeline with averaged weights in fp16; training may continue afterwards."""
        self.write(self.pipe, (self.pipe.unet, self.pipe.text_encoder, self.pipe.vae), out)


def _is_inner(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features, which is what Muon is for."""
    return weight.ndim > 1 and "embedding.weight" not in name and "conv_out" not in name and not name.startswith("2.")


@handle_errors()
def train(
    pool: Path,
    out: Path,
    vae: Annotated[Path, typer.Option(help="For a new model.")],
    tokenizer: Annotated[Path, typer.Option(help="For a new model.")],
    init: Annotated[
        Path | None, typer.Option(help="An earlier model to go on from; its VAE and tokenizer stay.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of computing, in all; the rate falls to their end.")] = 480,
    images: Annotated[int, typer.Option(min=1, help="Of the usual size in a batch.")] = 32,
    lr: float = 0.01,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the UNet."""
    start_ranks()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    known: dict[str, Any] = {"dtype": torch.float32, "safety_checker": None}
    pipe = new_pipeline(vae, tokenizer) if init is None else StableDiffusionPipeline.from_pretrained(init, **known)
    train_for(minutes, UNetTrainer(pipe, lr, seed), pool, out, images, seed)


if __name__ == "__main__":
    typer.run(train)
