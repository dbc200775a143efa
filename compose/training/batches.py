"""Random draws of every step: order, noise and timesteps, from the seed and the number of the row alone.

Nothing is kept between steps, so a resumed training draws the same as an uninterrupted one, and
rows do not depend on how they are split into processes and batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless row of examples with noise: every example once, in a new order every time.

    `kind` tells streams of one training apart.
    """

    examples: Examples
    seed: int
    kind: int
    noising: Noising

    def image(self, row: int) -> int:
        """The example of a row."""
        epoch, place = divmod(row, len(self.examples))
        order = torch.randperm(len(self.examples), generator=generator(self.seed, _ORDER, self.kind, epoch))
        return int(order[place])

    def draw(self, row: int) -> tuple[Tensor, Tensor, float]:
        """Latents, noise and time of a row."""
        latents, random = self.examples.latents[self.image(row)], generator(self.seed, self.kind, row)
        noise = torch.randn(latents.shape, generator=random)
        return latents, noise, self.noising.draw(random)


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
    """Images of some rows; their latents, noise, times, text and masks; further inputs of the network."""
    images = [stream.image(row) for row in rows]
    latents, noise, times = zip(*map(stream.draw, rows), strict=True)
    examples = stream.examples
    captions = examples.caption[images]
    tensors = torch.stack(latents), torch.stack(noise), torch.tensor(times), examples.text[captions]
    added = {name: value[captions] for name, value in examples.by_caption.items()}
    added |= {name: value[images] for name, value in examples.by_image.items()}
    return images, (*tensors, examples.mask[captions]), added


def batches_of(
    concept: Examples, prior: Examples | None, rows: WordFeatures | None, *, seed: int, sizes: tuple[int, int],
    noising: Noising, **share: int,
) -> Batches:  # fmt: skip
    """The batches of a training; arguments as in `Batches` and `Stream`."""
    of_concept = Stream(concept, seed, _CONCEPT, noising)
    of_class = None if prior is None else Stream(prior, seed, _CLASS, noising)
    return Batches(of_concept, of_class, rows, sizes, **share)
