"""A pass prepared for all steps: whatever does not change between steps is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise

import torch

from lora_compose.attention import Gates, Installation
from lora_compose.attention.device import to_device
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.attention.text_kv import TextKV
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.conditioning import Conditioning

Strengths = tuple[tuple[float, ...], tuple[int | None, ...]]
"""What changes over the steps: factors on the gates of each concept, and how many of its ranks act."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows that are run together: a slice of all rows."""

    text: Conditioning
    inputs: LayerInputs
    rows: slice


class KeptText:
    """Keys and values of the text of a pass, and of all passes with the same text under the same text gates.

    Only those for the latest strengths are kept: all steps of a schedule would take too much memory.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[bool, int], tuple[Strengths, TextKV]] = {}

    def of(self, conditional: bool, batch: int, strengths: Strengths) -> TextKV:
        """Keys and values of a micro-batch, or of its conditional rows only."""
        key = conditional, batch
        if key not in self._kept or self._kept[key][0] != strengths:
            self._kept[key] = strengths, TextKV()
        return self._kept[key][1]


@dataclass(frozen=True, eq=False)
class PreparedPass:
    """A pass with everything that is computed once for all steps: gates by layer, keys and values of its text.

    Attributes:
        kept_text: Keys and values of its text.
        apart: Whether no micro-batch has unconditional rows beside others.
        end: Number of tokens that are run, where the model sees none of those behind; None means all.
    """

    spec: Pass
    kept_text: KeptText = field(default_factory=KeptText)
    apart: bool = False
    end: int | None = None
    _made: dict[bool, tuple[Strengths, Sequence[MicroBatch]]] = field(default_factory=dict)

    def micro_batches(
        self,
        installation: Installation,
        concepts: ConceptSet,
        step: Step,
        ranks: tuple[int | None, ...] = (),
        *,
        conditional: bool,
    ) -> Sequence[MicroBatch]:
        """The micro-batches of the pass at the strengths of a step; computed again only if these change.

        `ranks` is how many ranks of the gates' concepts act (`ConceptSet.step_ranks`).
        """
        strengths = concepts.step_weights(step.index, step.count), ranks
        if conditional not in self._made or self._made[conditional][0] != strengths:
            self._made[conditional] = strengths, list(self._make(installation, concepts, strengths, conditional))
        # Keys and values are looked up, not held: those of earlier weights go, also of a pass that is no longer run.
        return [
            replace(batch, inputs=replace(batch.inputs, text_kv=self.kept_text.of(conditional, i, strengths)))
            for i, batch in enumerate(self._made[conditional][1])
        ]

    def _make(
        self, installation: Installation, concepts: ConceptSet, strengths: Strengths, conditional: bool
    ) -> Iterator[MicroBatch]:
        weights, ranks = strengths
        text, gates, regions, bias = self.spec.text, self.spec.gates, self.spec.joint_regions, self.spec.text_bias
        if conditional and text.guided:
            rows = text.roles.conditional
            regions = None if regions is None else regions.select(rows)
            bias = None if bias is None else bias.select(rows)
            gates, text = gates.select(rows), text.select(rows)
        if self.end is not None:
            text, gates = text.up_to(self.end), gates.up_to(self.end)
            bias = None if bias is None else bias.up_to(self.end)
        acting = [bool(concept.references) for concept in concepts.concepts]
        if any(acting):
            gates = gates.acting_on_references(acting)
        if concepts.schedules:
            gates = gates.times(to_device(torch.tensor(weights), gates.text.device))
        if ranks:
            gates = replace(gates, ranks=ranks)
        gates = concepts.scatter(gates)
        for part, part_gates, rows in _cut(text, gates, self.spec.branch_batch_size, apart=self.apart):
            inputs = installation.inputs(
                part_gates, part.prompt_embeds, self.spec.regions, lengths=part.lengths, read=part.read,
                joint_regions=None if regions is None else regions.select(rows),
                text_bias=None if bias is None else bias.select(rows), norm_regions=self.spec.norm_regions,
            )  # fmt: skip
            yield MicroBatch(part, inputs, rows)


def _cut(
    text: Conditioning, gates: Gates, size: int | None, *, apart: bool
) -> Iterator[tuple[Conditioning, Gates, slice]]:
    alike = [[*branches] for _, branches in groupby(text.roles.branches, lambda branch: apart and branch[1])]
    if size is None and len(alike) == 1:
        yield text, gates, slice(None)
        return
    ends = accumulate(
        min(size or len(group), len(group) - i) for group in alike for i in range(0, len(group), size or len(group))
    )
    for start, end in pairwise([0, *ends]):
        rows = slice(start * text.images, end * text.images)
        yield text.of_branches(slice(start, end)), gates.select(rows), rows
