"""LoRA Switch, from Multi-LoRA Composition for Image Generation (arXiv 2402.16843).

One LoRA at a time, cycling through the concepts in order. In step t = 1, 2, ... every adapted layer is

    W + w_i s_i B_i A_i        i = floor(((t - 1) mod (k tau)) / tau) + 1

for k concepts and the interval tau. One forward pass per step whatever the number of concepts. Styles have no turn;
they act in every step.

`docs/methods/switch.md` lists the differences from the authors' code.
"""

from dataclasses import dataclass

from lora_compose.pipelines.denoising.process import FixedPasses, Settings, subject_pass, warn_unread_by_passes
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.support.notes import warn_once


@dataclass(frozen=True)
class Switch(Settings):
    """One LoRA at a time, in turn.

    Attributes:
        interval: Number of steps until the next LoRA takes over; the paper's tau.
    """

    interval: int = 5

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of steps, at least 1, not {self.interval!r}")

    def start(self, session: Session) -> FixedPasses:
        """The pass of each subject; text encoders take part."""
        if any(concept.region for concept in session.concepts.concepts):
            warn_once("switch ignores regions; use method='regional'")
        warn_unread_by_passes(session)
        chosen = [(subject,) for subject in session.concepts.with_loras] or [()]
        return FixedPasses(session, [[(subject_pass(session, subject), 1.0)] for subject in chosen], self.interval)
