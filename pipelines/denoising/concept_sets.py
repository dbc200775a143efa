"""Prompts with different concept sets in one call.

A method sees one concept set, and starts a process for each. Methods with fixed passes then go through the model
together: the passes of all sets are joined row by row, so that a step costs the same as with one set. Other methods
need regions and maps for each set, and run set by set; the images equal those of separate calls.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import Gates, NormRegions
from lora_compose.pipelines.concepts.concept_set import ByConceptT
from lora_compose.pipelines.denoising.passes import Pass, weighted_mean
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import FixedPasses, Process
from lora_compose.pipelines.denoising.session import Runner, Session
from lora_compose.pipelines.scene.canvas import Step, images_of
from lora_compose.pipelines.text.conditioning import Conditioning, join_images, join_rows_of_images


def start(begin: Callable[[Session], Process], sessions: Sequence[Session], denoiser: Runner) -> Process:
    """Starts a method on one or several concept sets, with a session for each."""
    processes = [begin(session) for session in sessions]
    if len(processes) == 1:
        return processes[0]
    count = denoiser.canvas.images_per_prompt
    sets = [ImagesOfSet(session, images_of(session.prompts.indices, count)) for session in sessions]
    texts = [group.scatter(process.text) for group, process in zip(sets, processes, strict=True)]
    text = join_images(texts, [group.images for group in sets])
    fixed = [process for process in processes if type(process) is FixedPasses and _can_join(process)]
    if len(fixed) == len(sets):
        return Joined(denoiser, sets, fixed, text)
    return SetBySet(sets, processes, text)


def _can_join(process: FixedPasses) -> bool:
    """Whether all passes are of all images and the whole canvas, with one text for all cells."""
    passes = [spec for turn in process.turns for spec, _ in turn]
    return all(
        all(part is None for part in (spec.regions, spec.joint_regions, spec.text_bias, spec.window, spec.image))
        for spec in passes
    )


@dataclass(frozen=True)
class ImagesOfSet:
    """A concept set, and its images in the batch."""

    session: Session
    images: Sequence[int]

    def scatter(self, values: ByConceptT) -> ByConceptT:
        """Gates or text of this set as those of all concepts of the call; other concepts get 0."""
        return self.session.concepts.scatter(values)


@dataclass(frozen=True)
class Joined:
    """Processes with fixed passes, one for each concept set, run together; callbacks see `text`."""

    denoiser: Runner
    sets: Sequence[ImagesOfSet]
    processes: Sequence[FixedPasses]
    text: Conditioning
    _prepared: dict[tuple[int, ...], Sequence[tuple[PreparedPass, Tensor]]] = field(default_factory=dict)

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Folds nothing: gates that are constant in one set are not in the others."""
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The nth passes of all sets together; a set with fewer passes has weight 0 in the others."""
        turns = tuple(process.turn(step) for process in self.processes)
        if turns not in self._prepared:
            self._prepared[turns] = list(self._passes(turns))
        prepared = self._prepared[turns]
        predictions = [self.denoiser.predict(latents, step, handle) for handle, _ in prepared]
        prediction = weighted_mean(predictions, [weights for _, weights in prepared])
        return latents, self.sets[0].session.guider.combine(prediction, step)

    def _passes(self, turns: Sequence[int]) -> Iterable[tuple[PreparedPass, Tensor]]:
        """The joined passes of a turn, and the weight of each image in them. Shape: [images, 1, 1, 1]."""
        images = [group.images for group in self.sets]
        by_set = [process.turns[turn] for process, turn in zip(self.processes, turns, strict=True)]
        for n in range(max(map(len, by_set))):
            nth = [passes[n] if n < len(passes) else (passes[-1][0], 0.0) for passes in by_set]
            by_image = [torch.full((len(part),), weight) for part, (_, weight) in zip(images, nth, strict=True)]
            weights = join_rows_of_images(by_image, images)
            joined = self._joined([spec for spec, _ in nth])
            yield self.denoiser.prepare(joined), weights[:, None, None, None].to(self.denoiser.canvas.device)

    def _joined(self, passes: Sequence[Pass]) -> Pass:
        """One pass of all images."""
        images = [group.images for group in self.sets]
        texts = [group.scatter(spec.text) for group, spec in zip(self.sets, passes, strict=True)]
        gates = [group.scatter(spec.gates) for group, spec in zip(self.sets, passes, strict=True)]
        norms = join_norm_regions([spec.norm_regions for spec in passes], images)
        return Pass(join_images(texts, images), join_gates(gates, texts, images), norm_regions=norms)


def join_norm_regions(groups: Sequence[NormRegions | None], images: Sequence[Sequence[int]]) -> NormRegions | None:
    """The regions of several groups of images as those of all images; a group without any has one, the whole canvas."""
    known = [regions for regions in groups if regions is not None]
    if not known:
        return None
    shares = {}
    for grid, cells in known[0].shares.items():
        whole, most = cells.new_ones(1, 1, cells.shape[2]), max(regions.shares[grid].shape[1] for regions in known)
        parts = [whole if regions is None else regions.shares[grid] for regions in groups]
        padded = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts]
        rows = [part.expand(len(group), -1, -1) for part, group in zip(padded, images, strict=True)]
        shares[grid] = join_rows_of_images(rows, images)
    return NormRegions.of_shares(shares)


def join_gates(gates: Sequence[Gates], texts: Sequence[Conditioning], images: Sequence[Sequence[int]]) -> Gates:
    """The gates of several groups of images, with the same concepts and branches, as gates of all images.

    Args:
        gates: One for each group.
        texts: The texts of their rows.
    """

    def join(parts: Sequence[Tensor]) -> Tensor:
        rows = [part.expand(text.rows, *part.shape[1:]) for part, text in zip(parts, texts, strict=True)]
        return join_rows_of_images(rows, images)

    def join_positions(parts: Sequence[Tensor]) -> Tensor:
        positions = max(part.shape[1] for part in parts)
        return join([part.expand(-1, positions, -1) for part in parts])

    levels = gates[0].image
    return Gates(
        join_positions([gate.text for gate in gates]),
        {level: join_positions([gate.image[level] for gate in gates]) for level in levels},
        join([gate.row for gate in gates]),
        gates[0].latent_grid,
        modulation=join([gate.row if gate.modulation is None else gate.modulation for gate in gates]),
    )


@dataclass(frozen=True)
class SetBySet:
    """Processes of several concept sets, run one after the other; callbacks see `text`."""

    sets: Sequence[ImagesOfSet]
    processes: Sequence[Process]
    text: Conditioning

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Prepares each concept set on its own images."""
        return self._joined(
            process.prepare(_of_batch(latents, group.images), first)
            for group, process in zip(self.sets, self.processes, strict=True)
        )

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """A step of each concept set on its own images."""
        steps = [
            process.step(_of_batch(latents, group.images), step)
            for group, process in zip(self.sets, self.processes, strict=True)
        ]
        moved, outputs = zip(*steps, strict=True)
        return self._joined(moved), self._joined(outputs)

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """The images of all sets in the order of the batch."""
        order = [image for group in self.sets for image in group.images]
        return _of_batch(torch.cat(list(parts)), sorted(range(len(order)), key=order.__getitem__))


def _of_batch(batch: Tensor, images: Sequence[int]) -> Tensor:
    """Some images of a batch, in this order. An index tensor would have to be copied to the device in every step."""
    return torch.cat([batch[image : image + 1] for image in images])
