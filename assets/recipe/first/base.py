"""The playground's text encoder and UNet, trained together on latents of its world.

    python -m recipe.first.base sprites.npz CLOSE --tokenizer TOKENIZER --close-up \
        --batch 64 --steps 2500
    python -m recipe.first.base sprites.npz MODEL --init CLOSE --steps 7500
    python -m recipe.first.base sprites.npz BETTER --init MODEL --lr 0.006  (resumes)

About a second a step on two cores. A checkpoint next to OUT is written every 100 steps, and resumed. Close-ups come
first: the same time spent on whole scenes alone gives blobs. The UNet predicts v (Salimans & Ho 2022); the loss is
weighted by the signal-to-noise ratio (Hang et al. 2023); the average of the last weights is saved.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_compose.compose.playground.assets import PLAYGROUND_FLUX, playground_model
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import handle_errors
from recipe.averaged import NO_CAPTION, AveragedTrainer
from recipe.first.scenes import Batch, Batches
from recipe.loop import resume, run

WIDTH = 192
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
SNR_LIMIT = 5.0


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder."""
    tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        **tokens,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet; `attention_head_dim` is the number of heads, as in Stable Diffusion 1.x."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(80, 160, 240),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
    )


def pipeline(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a pipeline of diffusers."""
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    parts: dict[str, Any] = {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, requires_safety_checker=False, **parts
    )


class BaseTrainer(AveragedTrainer[Batch]):
    """Trains text encoder and UNet.

    Args:
        pipe: The pipeline, trained in place.
        lr: Learning rate of Muon, for matrices and convolutions; AdamW has a tenth of it for the rest.
        seed: Seed of noise, times and dropped captions.
    """

    def __init__(self, pipe: StableDiffusionPipeline, lr: float, seed: int) -> None:
        super().__init__([pipe.unet, pipe.text_encoder], _is_inner, lr, seed)
        self.pipe = pipe
        self.unet: Any = pipe.unet
        self.unet.set_attn_processor(AttnProcessor())  # on a CPU faster than fused kernels for heads this narrow
        self.text_encoder: Any = pipe.text_encoder
        self.schedule = DDPMScheduler(**NOISE)
        self._no_words = self._ids([""])[0]

    def _ids(self, captions: list[str]) -> Tensor:
        tokens: Any = self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids

    def loss(self, batch: Batch) -> Tensor:
        """The weighted error of v; half of the times are where shapes are decided."""
        x, ids, rng = batch.latents * self.pipe.vae.config.scaling_factor, self._ids(batch.captions), self.generator
        ids[torch.rand(len(ids), generator=rng) < NO_CAPTION] = self._no_words
        noise = torch.randn(x.shape, generator=rng)
        t = torch.randint(0, 1000, (len(x),), generator=rng)
        t[::2] = (torch.randn(len(t[::2]), generator=rng).sigmoid() * 1000).long()
        noisy: Any = self.schedule.add_noise(x, noise, t)  # type: ignore[arg-type]
        with cpu_autocast():
            predicted = self.unet(noisy, t, self.text_encoder(ids)[0]).sample
        velocity = self.schedule.get_velocity(x, noise, t)  # type: ignore[arg-type]
        snr = self.schedule.alphas_cumprod[t] / (1 - self.schedule.alphas_cumprod[t])
        weight = snr.clamp(max=SNR_LIMIT) / (snr + 1) + 0.25
        return ((predicted.float() - velocity).pow(2) * weight.view(-1, 1, 1, 1)).mean()

    def save(self, out: Path) -> None:
        """Writes the pipeline with averaged weights in fp16; training may continue afterwards."""
        self.write(self.pipe, (self.pipe.unet, self.pipe.text_encoder, self.pipe.vae), out)


def _is_inner(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features, which is what Muon is for."""
    return weight.ndim > 1 and "embedding.weight" not in name and "conv_out" not in name


@handle_errors()
def train(
    sprites: Path,
    out: Path,
    init: Annotated[Path | None, typer.Option(help="A model to start from.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE than that of the model to start from.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Another tokenizer than the playground's, for a new model.")
    ] = None,
    close_up: Annotated[bool, typer.Option("--close-up", help="Single objects on 64 x 64 pixels.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    lr: float = 0.01,
    uses: Annotated[
        int, typer.Option(min=1, help="Steps with the same images, each with new noise, which saves encoding.")
    ] = 2,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Trains the base model."""
    if init is not None and tokenizer is not None:
        raise ValueError("--tokenizer is for a new model; the text encoder of --init knows only its own")
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    pipe = _start(init, vae, tokenizer)
    trainer, checkpoint = BaseTrainer(pipe, lr, seed), out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    data = Batches(dict(np.load(sprites)), pipe.vae, seed + trainer.step, batch, close_up)
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6)
    run(trainer, (each for each in loader for _ in range(uses)), steps, checkpoint, "loss")
    trainer.save(out)


def _start(init: Path | None, vae: Path | None, tokenizer: Path | None) -> StableDiffusionPipeline:
    """A model to go on with, or a new one; around another VAE if one is given."""
    coder = AutoencoderKL.from_pretrained(vae, dtype=torch.float32) if vae else None
    if init is not None:
        return StableDiffusionPipeline.from_pretrained(init, dtype=torch.float32, **({"vae": coder} if coder else {}))
    words = CLIPTokenizer.from_pretrained(tokenizer or playground_model(PLAYGROUND_FLUX) / "tokenizer")
    coder = coder or AutoencoderKL.from_pretrained(playground_model(PLAYGROUND_FLUX) / "vae", dtype=torch.float32)
    return pipeline(coder, words, new_text_encoder(words), new_unet())


if __name__ == "__main__":
    typer.run(train)
