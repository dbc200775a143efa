"""Random draws of every step: order, noise and timesteps, from the seed and the number of the row alone.

Nothing is kept between steps, so a resumed training draws the same as an uninterrupted one, and
rows do not depend on how they are split into processes and batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_compose.compose.training.examples import Examples
from lora_compose.compose.training.learner import Batch
from lora_compose.compose.training.noising import Noising
from lora_compose.compose.training.words import WordFeatures

_ORDER, _CONCEPT, _CLASS = range(3)


def generator(seed: int, *key: int) -> torch.Generator:
    """A generator that belongs to a seed and a key."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class Row(NamedTuple):
    """Latents of an image, the noise to be predicted, that of the network's input, and the time."""

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    time: float


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless row of examples with noise: every example once, in a new order every time.

    `kind` tells streams of one training apart. The noise of the network's input is the other noise plus
    `input_perturbation` times noise of its own (Ning et al., arXiv 2301.11706).
    """

    examples: Examples
    seed: int
    kind: int
    noising: Noising
    input_perturbation: float = 0.0

    def image(self, row: int) -> int:
        """The example of a row."""
        epoch, place = divmod(row, len(self.examples))
        order = torch.randperm(len(self.examples), generator=generator(self.seed, _ORDER, self.kind, epoch))
        return int(order[place])

    def draw(self, row: int) -> Row:
        """A row."""
        latents, random = self.examples.latents[self.image(row)], generator(self.seed, self.kind, row)
        noise = torch.randn(latents.shape, generator=random)
        time = self.noising.draw(random)
        if not self.input_perturbation:
            return Row(latents, noise, noise, time)
        perturbation = self.input_perturbation * torch.randn(noise.shape, generator=random)
        return Row(latents, noise, noise + perturbation, time)


@dataclass(frozen=True, eq=False)
class Batches:
    """Makes the batches of a training: rows of the concept and of its class, whose numbers are `sizes`.

    A step has `accumulate` batches and is shared by `processes`, of which this is number `process`. `rows` are the
    features at the words, for the alignment; None without one.
    """

    concept: Stream
    prior: Stream | None
    rows: WordFeatures | None
    sizes: tuple[int, int]
    accumulate: int = 1
    processes: int = 1
    process: int = 0

    def of(self, step: int, part: int) -> Batch:
        """The batch of this process in a step; `part` counts the batches in the step. On the CPU."""
        number = (step * self.accumulate + part) * self.processes + self.process
        streams = [(self.concept, self.sizes[0])] + ([(self.prior, self.sizes[1])] if self.prior else [])
        parts = (_rows_of(stream, range(number * size, (number + 1) * size)) for stream, size in streams)
        images, tensors, added = zip(*parts, strict=True)
        captions = [int(self.concept.examples.caption[image]) for image in images[0]]
        return Batch(
            *map(torch.cat, zip(*tensors, strict=True)),
            added={name: torch.cat([part[name] for part in added]) for name in added[0]},
            weights=torch.zeros(0) if self.rows is None else self.rows.weights(captions),
            own=self.sizes[0],
        )


def _rows_of(stream: Stream, rows: range) -> tuple[Sequence[int], Sequence[Tensor], dict[str, Tensor]]:
    """Images of some rows; their latents, both noises, times, text and masks; further inputs of the network."""
    images = [stream.image(row) for row in rows]
    latents, noise, input_noise, times = zip(*map(stream.draw, rows), strict=True)
    examples = stream.examples
    captions = examples.caption[images]
    tensors = *map(torch.stack, (latents, noise, input_noise)), torch.tensor(times), examples.text[captions]
    added = {name: value[captions] for name, value in examples.by_caption.items()}
    added |= {name: value[images] for name, value in examples.by_image.items()}
    return images, (*tensors, examples.mask[captions]), added


def batches_of(
    concept: Examples, prior: Examples | None, rows: WordFeatures | None, *, seed: int, sizes: tuple[int, int],
    noising: Noising, input_perturbation: float = 0.0, **share: int,
) -> Batches:  # fmt: skip
    """The batches of a training; arguments as in `Batches` and `Stream`."""
    of_concept = Stream(concept, seed, _CONCEPT, noising, input_perturbation)
    of_class = None if prior is None else Stream(prior, seed, _CLASS, noising, input_perturbation)
    return Batches(of_concept, of_class, rows, sizes, **share)
