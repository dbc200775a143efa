"""The VAE: sixteen channels on cells of eight pixels, trained on crops around objects.

    PYTHONPATH=assets python -m recipe.vae drawings.npz VAE --minutes 100
    PYTHONPATH=assets python -m recipe.vae drawings.npz BETTER --init VAE --decoder-only --minutes 30
    PYTHONPATH=assets python -m recipe.vae drawings.npz VAE --minutes 0     (only measures the checkpoint, or --init)

A checkpoint next to OUT is resumed. Training the decoder alone leaves the latents as they are, so that a denoiser that
was trained on them stays valid. The posterior is tight by construction: the rows of `quant_conv` that give the
log-variance are zero, with a bias of -30, and get no gradient. Latents made smaller decode to the image made smaller
(Kouzelis et al. 2025): so an object has nearly the same latents at all sizes, and a denoiser has less to learn.
"""

import time
from collections.abc import Iterator, Sequence
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
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.averaged import forget_origin
from recipe.loop import Optimizers, keep, resume, share
from recipe.ranks import of_first, rank, ranks, start_ranks
from recipe.world import CHARACTERS, CLASSES, SIZE, Drawings, Pixels, background, look, place, squares

CELL = 8
CHANNELS = 16
CROP = 96
JITTER = 0.05  # noise on latents in training: the decoder will see those of a denoiser, which are not exact
SCALES = (1.0, 0.5, 1.0, 0.75)  # of latents and image, step by step
EDGES = 0.5  # weight of errors in the gradients of the image
COLOURS_FIRST = 300  # steps of a new VAE before edges count
EMA = 0.998
EVERY = 100  # steps between two lines of progress
CHECKED_EVERY = 500  # steps between two measurements
LOG_VARIANCE = -30.0


def new_vae() -> AutoencoderKL:
    """An untrained VAE."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 64, 128, 192),
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "mid_block_add_attention": False,
    }
    vae: Any = AutoencoderKL(**config)
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = LOG_VARIANCE
    return vae


def scene(rng: Generator, drawings: Drawings, *, characters: float, others: float) -> tuple[Pixels, list]:
    """An image without words, and the squares of its objects.

    Args:
        rng: Everything random comes from it.
        drawings: The artwork.
        characters: Share of objects that are characters.
        others: Share of objects that are none of this world.
    """
    image, _ = background(rng)
    found = squares(rng, int(rng.integers(1, 4)))
    rest = [name for name in drawings if name.startswith("other:")]
    for square in found:
        kind = rng.random()
        if kind < characters:
            sprite = list(CHARACTERS.values())[rng.integers(len(CHARACTERS))].drawn(drawings)
        elif kind < characters + others:
            sprite = drawings[rest[rng.integers(len(rest))]]
        else:
            sprite = look(rng, drawings, CLASSES[rng.integers(len(CLASSES))]).sprite
        place(image, sprite, square, rng.random() < 0.5)
    return image.clip(0, 255).astype("u1"), found


class Crops(IterableDataset):
    """Endless batches of crops around objects, on whole cells, drawn in a process of their own.

    Args:
        drawings: The artwork.
        seed: Seed of everything random.
        batch_size: Crops of a batch, an even number. Shape of a batch: [crops, 3, CROP, CROP], -1 to 1.
    """

    def __init__(self, drawings: Drawings, seed: Sequence[int], batch_size: int) -> None:
        self.drawings, self.seed, self.batch_size = drawings, seed, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            pixels = np.stack([crop for _ in range(self.batch_size // 2) for crop in self._crops(rng)])
            yield as_tensor(pixels)

    def _crops(self, rng: Generator) -> list[Pixels]:
        image, found = scene(rng, self.drawings, characters=0.3, others=0.25)
        crops = []
        for left, top, side in (found[i] for i in rng.integers(len(found), size=2)):
            x, y = (_start(rng, edge + side // 2) for edge in (left, top))
            crops.append(image[y : y + CROP, x : x + CROP])
        return crops


def as_tensor(pixels: Pixels) -> Tensor:
    """Images as a VAE takes them. Shape: [images, 3, height, width], -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _start(rng: Generator, centre: int) -> int:
    """Where a crop around a point starts, on a whole cell."""
    cell = (centre - CROP // 2) // CELL + rng.integers(-4, 5)
    return int(np.clip(cell, 0, (SIZE - CROP) // CELL)) * CELL


class VaeTrainer:
    """A VAE with its optimizers, and the running average of its weights.

    Args:
        vae: The VAE, trained in place.
        lr: Muon's learning rate.
        decoder_only: Leave the latents as they are.
        colours_first: Steps before edges count.
    """

    def __init__(self, vae: AutoencoderKL, lr: float, *, decoder_only: bool, colours_first: int) -> None:
        self.vae: Any = vae
        self.frozen_latents = decoder_only
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.weights = [p for p in vae.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]
        inner, rest = [p for p in self.weights if p.ndim > 1], [p for p in self.weights if p.ndim < 2]
        self.optimizers = Optimizers(inner, rest, lr, betas=(0.9, 0.95))
        self.step, self.seconds, self.colours_first = 0, 0.0, colours_first

    def learn(self, batch: Tensor, share: float) -> float:
        """One step; returns the mean square error on a scale of -1 to 1."""
        scale = 1.0 if self.frozen_latents else SCALES[self.step % len(SCALES)]
        with cpu_autocast():
            latents = _resized(self.vae.encode(batch).latent_dist.mean, scale)
            decoded = self.vae.decode(latents + JITTER * torch.randn_like(latents)).sample.float()
        error = decoded - _resized(batch, scale)
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 1e-3 * F.relu(latents.float().pow(2).mean() - 1)
        if self.step >= self.colours_first:
            loss = loss + EDGES * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        loss.backward()
        self.optimizers.step(share)
        self.step += 1
        kept = min(EMA, self.step / (self.step + 20))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - kept)
        return error.detach().pow(2).mean().item()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights and their average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume, except the noise on latents."""
        optimizers = self.optimizers.state_dict()
        own = {"step": self.step, "seconds": self.seconds, "average": self.average}
        return own | {"vae": self.vae.state_dict(), "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.vae.load_state_dict(state["vae"])
        self.optimizers.load_state_dict(state["optimizers"])


def _resized(images: Tensor, scale: float) -> Tensor:
    """Images or latents made smaller, without aliasing."""
    if scale == 1:
        return images
    return F.interpolate(images.float(), scale_factor=scale, mode="bilinear", antialias=True)


@torch.no_grad()
def measured(vae: Any, images: Pixels) -> Tensor:
    """The peak signal-to-noise ratio of each image, encoded and decoded, in dB."""
    found = []
    for part in as_tensor(images).split(4):
        with cpu_autocast():
            decoded = vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp(-1, 1)
        found.append(10 * torch.log10(4 / (decoded - part).pow(2).mean((1, 2, 3))))
    return torch.cat(found)


def check_images(drawings: Drawings, number: int = 2) -> dict[str, Pixels]:
    """Images of every character, as its references show it, and of the base world."""
    rng = np.random.default_rng(99)
    found = {}
    for name, known in CHARACTERS.items():
        images = []
        for _ in range(number):
            image, _ = background(rng)
            place(image, known.drawn(drawings), squares(rng, 1)[0])
            images.append(image.clip(0, 255).astype("u1"))
        found[name] = np.stack(images)
    base = [scene(rng, drawings, characters=0, others=0)[0] for _ in range(5 * number)]
    return found | {"base": np.stack(base)}


def _report(trainer: VaeTrainer, drawings: Drawings) -> None:
    trainer.swap()
    values = {name: measured(trainer.vae, images) for name, images in check_images(drawings).items()}
    trainer.swap()
    each = ", ".join(f"{name} {value.mean():.1f}" for name, value in values.items())
    echo(f"{trainer.step} dB {torch.cat(list(values.values())).mean():.2f}: {each}")


@handle_errors()
def train(
    artwork: Path,
    out: Path,
    init: Annotated[Path | None, typer.Option(help="A VAE to start from.")] = None,
    decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Leave the latents as they are.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Of computing, in all; the rate falls towards their end.")] = 60,
    batch: Annotated[int, typer.Option(min=2)] = 8,
    lr: float = 0.01,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the VAE."""
    start_ranks()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    vae = AutoencoderKL.from_pretrained(init, dtype=torch.float32) if init else new_vae()
    trainer = VaeTrainer(vae, lr, decoder_only=decoder_only, colours_first=0 if init else COLOURS_FIRST)
    checkpoint = out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    drawings = dict(np.load(artwork))
    torch.manual_seed(seed + rank() + trainer.step)
    crops = Crops(drawings, (seed, rank(), trainer.step), batch // ranks())
    errors: list[float] = []
    for each in DataLoader(crops, batch_size=None, num_workers=1, prefetch_factor=6):
        start, done = time.process_time(), of_first(trainer.seconds) / max(60 * minutes, 1e-9)
        if done >= 1:
            break
        errors.append(trainer.learn(each, share(trainer.step, done)))
        trainer.seconds += ranks() * (time.process_time() - start)
        if trainer.step % EVERY == 0 and not rank():
            decibel = 10 * np.log10(4 / np.mean(errors))
            echo(f"{trainer.step} {decibel:.2f} dB in training, {trainer.seconds:.0f} s")
            errors = []
            keep(checkpoint, trainer.state_dict())
        if trainer.step % CHECKED_EVERY == 0 and not rank():
            _report(trainer, drawings)
    if rank():
        return
    _report(trainer, drawings)
    if not minutes:
        return
    trainer.swap()
    if not decoder_only:  # a denoiser may have been trained on the latents as they are scaled
        scale_of(vae, drawings)
    vae.half().save_pretrained(out)
    forget_origin(out)


@torch.no_grad()
def scale_of(vae: Any, drawings: Drawings) -> None:
    """Sets the scaling factor: latents of the base world have unit variance."""
    latents = vae.encode(as_tensor(check_images(drawings)["base"])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


if __name__ == "__main__":
    typer.run(train)
