"""Pictures for the playground's transformer, drawn and encoded in advance: shards of latents and captions.

    python -m recipe.first.transformer_data sprites.npz POOL/close --close-up --shards 24
    python -m recipe.first.transformer_data sprites.npz POOL/scenes --shards 100

Training may begin with the first shards; later ones are added. Objects lie on whole patches of two latent cells, so
that a transformer, which has to learn translations, sees every sprite in few forms.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.playground.assets import PLAYGROUND_FLUX, playground_model
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.first.scenes import Batch, Picture, encode, scene
from recipe.first.world import CLOSE_UP, SIZE, Sprites, Square

PATCH = 16  # pixels of a transformer's token
SIDES = {1: (48, 64, 80), 2: (48, 64), 3: (48,)}
"""Object sizes by number of objects; all whole patches."""
SHARD = 512  # pictures
AT_ONCE = 16  # pictures through the VAE


def picture(rng: Generator, sprites: Sprites, close_up: bool) -> Picture:
    """A close-up of one object, or a scene of one to three."""
    side = CLOSE_UP if close_up else SIZE
    count = 1 if close_up else int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    return scene(rng, sprites, size=(side, side), count=count, where=patches)


def patches(rng: Generator, count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Square]:
    """So many squares on whole patches that do not overlap, left to right, in a square image."""
    side = min(size)
    sides = [each for each in SIDES[count] if each <= side]
    while True:
        tried = [_square(rng, int(rng.choice(sides)), side) for _ in range(count)]
        if not any(_overlap(a, b) for i, a in enumerate(tried) for b in tried[:i]):
            return sorted(tried)


def _square(rng: Generator, own: int, side: int) -> Square:
    x, y = (int(v) * PATCH for v in rng.integers(0, (side - own) // PATCH + 1, 2))
    return x, y, own


def _overlap(a: Square, b: Square) -> bool:
    return all(min(a[i] + a[2], b[i] + b[2]) > max(a[i], b[i]) for i in (0, 1))


def write_shard(path: Path, pictures: list[Picture], vae: AutoencoderKL) -> None:
    """Pictures as latents, in fp16 and scaled as diffusers scales them, and captions."""
    parts = [pictures[i : i + AT_ONCE] for i in range(0, len(pictures), AT_ONCE)]
    latents = torch.cat([encode(vae, [one.image for one in part]) for part in parts])
    scale: Any = vae.config["scaling_factor"]
    buffer = io.BytesIO()
    torch.save({"latents": (latents * scale).half(), "captions": [one.caption for one in pictures]}, buffer)
    write_whole(path, buffer.getvalue())


class Pool:
    """Pictures of all existing shards; new ones are added now and then.

    Args:
        folder: The folder of the shards.
        seed: Seed of the order.
    """

    LOOK = 50  # batches between two checks for new shards

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self._read: set[Path] = set()
        self._latents: list[Tensor] = []
        self.captions: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def look(self) -> None:
        """Adds new shards."""
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self._read:
                shard = torch.load(path, weights_only=True)
                self._latents.append(shard["latents"])
                self.captions += shard["captions"]
                self._read.add(path)
        if not self.captions:
            raise FileNotFoundError(f"there are no pictures in {self.folder}; make some with transformer_data")

    def batches(self, size: int) -> Iterator[Batch]:
        """Endless batches of pictures drawn at random."""
        done = 0
        while True:
            if done % self.LOOK == 0:
                self.look()
            chosen = self.rng.integers(len(self), size=size).tolist()
            latents = [self._latents[i // SHARD][i % SHARD] for i in chosen]
            yield Batch(torch.stack(latents).float(), [self.captions[i] for i in chosen])
            done += 1


@handle_errors()
def main(
    sprites: Path,
    out: Path,
    close_up: Annotated[bool, typer.Option("--close-up", help="Single objects on 64 x 64 pixels.")] = False,
    shards: Annotated[int, typer.Option(min=1, help=f"Of {SHARD} pictures each.")] = 60,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Draws and encodes pictures."""
    torch.set_num_threads(threads)
    artwork = dict(np.load(sprites))
    vae: Any = AutoencoderKL.from_pretrained(playground_model(PLAYGROUND_FLUX) / "vae", dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    out.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = out / f"{number:04}.pt"
        if not path.exists():
            rng = np.random.default_rng([seed, number])
            write_shard(path, [picture(rng, artwork, close_up) for _ in range(SHARD)], vae)
            echo(f"{path}")


if __name__ == "__main__":
    typer.run(main)
