"""Images for the denoisers, drawn and encoded in advance: shards of latents and captions, for both models.

    PYTHONPATH=assets python -m recipe.pool drawings.npz VAE POOL --shards 100

Training may begin with the first shards; later ones are added while it runs. A pool has a folder for each size of its
images: close-ups, whole scenes, wide scenes.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.hints import as_numbers
from recipe.ranks import rank, ranks, start_ranks
from recipe.scenes import Picture, scene
from recipe.vae import as_tensor
from recipe.world import CLOSE_UP, SIZE, WIDE

SIZES = {"close": (CLOSE_UP, CLOSE_UP), "scenes": (SIZE, SIZE), "wide": WIDE}
SHARD = 256  # images
TURN = ("close", "scenes", "scenes", "scenes", "wide")
"""Folders in the order in which they get a shard."""


class Batch(NamedTuple):
    """Images of one size.

    Attributes:
        latents: Scaled latents.
        captions: Their captions.
        objects: What lies where, as by `hints.as_numbers`.
    """

    latents: Tensor
    captions: list[str]
    objects: Tensor


@torch.no_grad()
def encode(vae: Any, pictures: list[Picture]) -> Tensor:
    """Images as latents, scaled as diffusers scales them. Shape: [images, channels, height / 8, width / 8]."""
    latents = []
    for part in as_tensor(np.stack([picture.image for picture in pictures])).split(8):
        with cpu_autocast():
            latents.append(vae.encode(part).latent_dist.mean.float())
    return torch.cat(latents) * vae.config.scaling_factor


class Pool:
    """Images of all existing shards; new ones are added now and then.

    Args:
        folder: The pool.
        shares: Which share of the batches comes from which folder.
        seed: Seed of the order. All processes take a batch from the same folder, so that none waits for another.
    """

    LOOK = 50  # batches between two checks for new shards

    def __init__(self, folder: Path, shares: Mapping[str, float], seed: Sequence[int]) -> None:
        self.folder, self.rng, self.of_all = folder, np.random.default_rng([*seed, rank()]), np.random.default_rng(seed)
        self.names = list(shares)
        self.mix(shares)
        self._read: set[Path] = set()
        self._latents: dict[str, list[Tensor]] = {name: [] for name in shares}
        self._objects: dict[str, list[Tensor]] = {name: [] for name in shares}
        self.captions: dict[str, list[str]] = {name: [] for name in shares}

    def mix(self, shares: Mapping[str, float]) -> None:
        """Sets which share of the batches comes from which folder."""
        self._shares = np.array([shares[name] for name in self.names]) / sum(shares.values())

    def __len__(self) -> int:
        return sum(map(len, self.captions.values()))

    def look(self) -> None:
        """Adds new shards.

        Raises:
            FileNotFoundError: If one of the folders has none.
        """
        for name in self.names:
            for path in sorted((self.folder / name).glob("*.pt")):
                if path not in self._read:
                    shard = torch.load(path, weights_only=True)
                    self._latents[name].append(shard["latents"])
                    self._objects[name].append(shard["objects"])
                    self.captions[name] += shard["captions"]
                    self._read.add(path)
            if not self.captions[name]:
                raise FileNotFoundError(f"there are no images in {self.folder / name}; make some with recipe.pool")

    def batches(self, cells: int) -> Iterator[Batch]:
        """Endless batches of images drawn at random; each has about so many latent cells."""
        done = 0
        while True:
            if done % self.LOOK == 0:
                self.look()
            name = self.names[self.of_all.choice(len(self.names), p=self._shares)]
            latents, objects, captions = self._latents[name], self._objects[name], self.captions[name]
            number = max(1, round(cells / latents[0][0, 0].numel()))
            chosen = self.rng.integers(len(captions), size=number).tolist()
            yield Batch(
                torch.stack([latents[i // SHARD][i % SHARD] for i in chosen]).float(),
                [captions[i] for i in chosen],
                torch.stack([objects[i // SHARD][i % SHARD] for i in chosen]),
            )
            done += 1


@handle_errors()
def main(
    artwork: Path,
    vae: Path,
    out: Path,
    shards: Annotated[int, typer.Option(min=1, help=f"Of {SHARD} images each.")] = 100,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Draws and encodes images."""
    start_ranks()
    torch.set_num_threads(threads)
    drawings = dict(np.load(artwork))
    coder: Any = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    for number in range(rank(), shards, ranks()):
        name = TURN[number % len(TURN)]
        path = out / name / f"{number:04}.pt"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        pictures = [scene(rng, drawings, size=SIZES[name]) for _ in range(SHARD)]
        buffer = io.BytesIO()
        shard = {
            "latents": encode(coder, pictures).half(),
            "captions": [picture.caption for picture in pictures],
            "objects": torch.stack([as_numbers(picture.objects) for picture in pictures]),
        }
        torch.save(shard, buffer)
        write_whole(path, buffer.getvalue())
        echo(f"{path}")


if __name__ == "__main__":
    typer.run(main)
