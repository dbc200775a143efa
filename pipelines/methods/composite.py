"""LoRA Composite, from Multi-LoRA Composition for Image Generation (arXiv 2402.16843).

In every step each of the k LoRAs, alone in the model, predicts without and with the prompt, and the guided predictions
are averaged. With theta_j for the model with LoRA j, guidance scale s and prompt c,

    e = (1/k) sum_j w_j [e_theta_j(z) + s (e_theta_j(z, c) - e_theta_j(z))]

Styles have no passes of their own: they act in those of every subject.

Guidance is linear, so averaging first and applying guidance once gives the same; `guidance_rescale` then uses the
averages.

`docs/methods/composite.md` lists the differences from the authors' code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_compose.pipelines.denoising.process import FixedPasses, Settings, subject_pass, warn_unread_by_passes
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.support.notes import warn_once


@dataclass(frozen=True)
class Composite(Settings):
    """The average of the predictions with each LoRA alone.

    Attributes:
        shares: Weight of each subject's prediction, in the order of the concepts: the paper's w_j; only ratios matter.
            None means equal weights.
    """

    shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.shares is not None and not _proper(self.shares):
            raise ValueError(f"shares must be non-negative numbers, not all 0, not {self.shares!r}")

    def start(self, session: Session) -> FixedPasses:
        """A pass for each subject; text encoders take part."""
        concepts = session.concepts
        if any(concept.region for concept in concepts.concepts):
            warn_once("composite ignores regions; use method='regional'")
        chosen = [(subject,) for subject in concepts.with_loras] or [()]
        shares = [1.0] * len(chosen) if self.shares is None else self.shares
        if len(shares) != len(chosen):
            passes = "passes: styles have none of their own" if concepts.styles else "concepts"
            raise ValueError(f"composite has {len(shares)} shares, but there are {len(chosen)} {passes}")
        warn_unread_by_passes(session)
        averaged = [
            (subject_pass(session, subject), share / sum(shares)) for subject, share in zip(chosen, shares, strict=True)
        ]
        return FixedPasses(session, [averaged])


def _proper(shares: object) -> bool:
    return (
        isinstance(shares, list | tuple)
        and all(type(share) in (int, float) and math.isfinite(share) and share >= 0 for share in shares)
        and sum(shares) > 0
    )
