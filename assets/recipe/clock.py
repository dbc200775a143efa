"""Training of a denoiser for some minutes of computing, over several sittings."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lora_compose.compose.support.terminal import echo
from recipe.loop import Trainer, keep, resume, share
from recipe.pool import Batch, Pool
from recipe.ranks import of_first, rank, ranks
from recipe.world import SIZE

EVERY = 50  # steps between two lines of progress
KEPT_EVERY = 180  # seconds between two checkpoints
SAVED_EVERY = 1800  # seconds between two models to look at
CELLS = (SIZE // 8) ** 2


class Denoiser(Trainer, Protocol):
    """A denoiser in training that can be saved as a pipeline."""

    def save(self, out: Path) -> None:
        """Writes the pipeline with averaged weights."""
        ...


class Clocked:
    """A denoiser in training.

    Attributes:
        step: Steps so far.
        seconds: What they took on the processors, in all sittings.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.step, self.seconds = denoiser, denoiser.step, 0.0

    def learn(self, batch: Batch, share: float) -> float:
        """One step, with a share of the learning rate; returns the loss."""
        start = time.process_time()
        loss = self.denoiser.learn(batch, share)
        self.step = self.denoiser.step
        self.seconds += ranks() * (time.process_time() - start)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of a checkpoint."""
        return {"denoiser": self.denoiser.state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        self.seconds = state["seconds"]
        self.denoiser.load_state_dict(state["denoiser"])
        self.step = self.denoiser.step


def shares(done: float) -> Mapping[str, float]:
    """Shares of the batches by size, when so much of the training is done, from 0 to 1."""
    close = max(0.1, 0.8 - 2.8 * done)
    return {"close": close, "scenes": 0.8 * (1 - close), "wide": 0.2 * (1 - close)}


def train_for(minutes: float, denoiser: Denoiser, pool: Path, out: Path, images: int, seed: int) -> None:
    """Trains for so many minutes of computing in all, and saves the model.

    Args:
        minutes: In all, over all sittings.
        denoiser: Trained in place.
        pool: Images.
        out: The model; its checkpoint lies beside it, and is resumed.
        images: Images of the usual size in a batch, of all processes together.
        seed: Seed of the order of the images.
    """
    trainer, checkpoint = Clocked(denoiser), out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    pictures = Pool(pool, shares(0), (seed, trainer.step))
    losses: list[float] = []
    kept = saved = time.monotonic()
    for batch in pictures.batches(images * CELLS // ranks()):
        done = of_first(trainer.seconds) / (60 * minutes)
        if done >= 1:
            break
        pictures.mix(shares(done))
        losses.append(trainer.learn(batch, share(trainer.step, done)))
        if trainer.step % EVERY == 0 and not rank():
            mean = sum(losses) / len(losses)
            echo(f"{trainer.step} loss {mean:.4f} {trainer.seconds / 60:.1f} minutes, {len(pictures)} images")
            losses = []
        if time.monotonic() - kept > KEPT_EVERY:
            keep(checkpoint, trainer.state_dict())
            kept = time.monotonic()
        if time.monotonic() - saved > SAVED_EVERY:
            denoiser.save(out)
            saved = time.monotonic()
    keep(checkpoint, trainer.state_dict())
    denoiser.save(out)
