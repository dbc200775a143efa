"""The playground's AutoencoderKL: eight channels on cells of eight pixels, trained on crops around objects.

    python -m recipe.first.vae sprites.npz OUT --steps 3000
    python -m recipe.first.vae sprites.npz OUT --init VAE --decoder-only

About a second a step on two cores. A checkpoint next to OUT is written every 100 steps, and resumed. Training the
decoder alone leaves the latents as they are, so that a denoiser that was trained on them stays valid.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import handle_errors
from recipe.first.scenes import scene
from recipe.first.world import (
    BASE_VENDORS,
    CELL,
    CONCEPTS,
    SIZE,
    VENDORS,
    Pixels,
    Sprites,
    dress,
    place,
)
from recipe.loop import Optimizers, resume, run

CROP = 64
JITTER = 0.03  # noise on latents in training: the decoder will see those of a denoiser, which are not exact
EDGES = 0.4  # weight of errors in the gradients of the image
COLOURS_FIRST = 400  # steps of a new VAE before edges count


def new_vae() -> AutoencoderKL:
    """An untrained VAE."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 64, 96, 128),
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**config)


def tighten(vae: AutoencoderKL) -> None:
    """Sets the log-variance of the posterior to a constant, diffusers' least: what is sampled is the mean.

    Training uses the mean alone and leaves the variance as it was drawn, but image-to-image and inpainting sample.
    """
    last: Any = vae.quant_conv
    with torch.no_grad():
        last.weight.chunk(2)[1].fill_(0.0)
        last.bias.chunk(2)[1].fill_(-30.0)


class Crops(IterableDataset):
    """Endless batches of crops around objects, on whole cells, drawn in a process of their own.

    Args:
        sprites: The artwork.
        seed: Seed of everything random.
        batch_size: Crops of a batch, an even number. Shape of a batch: [crops, 3, CROP, CROP], -1 to 1.
    """

    def __init__(self, sprites: Sprites, seed: int, batch_size: int) -> None:
        self.sprites, self.seed, self.batch_size = sprites, seed, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            pixels = np.stack([crop for _ in range(self.batch_size // 2) for crop in self._crops(rng)])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _crops(self, rng: Generator) -> list[Pixels]:
        """Two crops of one image, mostly of the base model's artist; coats of every colour among them."""
        vendors = BASE_VENDORS if rng.random() < 0.8 else VENDORS
        image, _, objects = scene(rng, self.sprites, vendors=vendors)
        if rng.random() < 0.3:  # colours as strong as those of the concepts
            name, square = objects[rng.integers(len(objects))]
            coats = [known.coat for known in CONCEPTS.values() if known.coat]
            coat = coats[rng.integers(len(coats))]._replace(hue=int(rng.integers(180)))
            place(image, dress(self.sprites[f"{name}/{vendors[rng.integers(len(vendors))]}"], coat), square)
        found = []
        for square in (objects[i][1] for i in rng.integers(len(objects), size=2)):
            x, y = (_start(rng, edge + square[2] // 2) for edge in square[:2])
            found.append(image[y : y + CROP, x : x + CROP])
        return found


def _start(rng: Generator, centre: int) -> int:
    """Where a crop around a point starts, on a whole cell."""
    cell = (centre - CROP // 2) // CELL + rng.integers(-3, 4)
    return int(np.clip(cell, 0, (SIZE - CROP) // CELL)) * CELL


class VaeTrainer:
    """A VAE with its optimizers.

    Args:
        vae: The VAE, trained in place.
        lr: Muon's learning rate.
        decoder_only: Leave the latents as they are.
        colours_first: Steps before edges count.
    """

    def __init__(self, vae: AutoencoderKL, lr: float, *, decoder_only: bool, colours_first: int) -> None:
        self.vae: Any = vae
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        weights = [p for p in vae.parameters() if p.requires_grad]
        inner, rest = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim < 2]
        self.optimizers = Optimizers(inner, rest, lr, betas=(0.9, 0.95))
        self.step, self.colours_first = 0, colours_first

    def learn(self, batch: Tensor, share: float) -> float:
        """One step; returns the root mean square error on a scale of -1 to 1."""
        with cpu_autocast():
            latents = self.vae.encode(batch).latent_dist.mean
            decoded = self.vae.decode(latents + JITTER * torch.randn_like(latents)).sample.float()
        error = decoded - batch
        loss = error.abs().mean() + error.pow(2).mean() + 1e-3 * F.relu(latents.float().pow(2).mean() - 1)
        if self.step >= self.colours_first:
            loss = loss + EDGES * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        loss.backward()
        self.optimizers.step(share)
        self.step += 1
        return error.detach().pow(2).mean().sqrt().item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume, except the noise on latents."""
        return {"step": self.step, "vae": self.vae.state_dict(), "optimizers": self.optimizers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        self.step = state["step"]
        self.vae.load_state_dict(state["vae"])
        self.optimizers.load_state_dict(state["optimizers"])


@handle_errors()
def train(
    sprites: Path,
    out: Path,
    init: Annotated[Path | None, typer.Option(help="A VAE to start from.")] = None,
    decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Leave the latents as they are.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    lr: float = 0.01,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Trains the VAE."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    vae = AutoencoderKL.from_pretrained(init, dtype=torch.float32) if init else new_vae()
    trainer = VaeTrainer(vae, lr, decoder_only=decoder_only, colours_first=0 if init else COLOURS_FIRST)
    checkpoint = out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    crops = Crops(dict(np.load(sprites)), seed + trainer.step, batch)
    run(trainer, iter(DataLoader(crops, batch_size=None, num_workers=1, prefetch_factor=6)), steps, checkpoint, "error")
    tighten(vae)
    vae.half().save_pretrained(out)


if __name__ == "__main__":
    typer.run(train)
