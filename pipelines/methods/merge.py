"""Merge: the sum of all LoRAs, the common baseline.

Every layer becomes W + sum_i w_i s_i B_i A_i, for all tokens, cells and rows, text encoders included. With several
subjects the deltas act on each other's tokens and cells, so identities blend or one of them wins. Styles act
everywhere, so other methods do the same where a scene has no subjects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_compose.attention import SitePart
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import FixedPasses, Settings, check_limit, constant_gates, one_text
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.denoising.together import Together, limited
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.support.notes import warn_once

EVERYWHERE: Sequence[SitePart] = ("text", "image", "reference", "other", "row", "modulation")


@dataclass(frozen=True)
class Merge(Settings):
    """The sum of all LoRAs, as most tools do it.

    Attributes:
        limit: The most that the joint change of a layer may be, as a multiple of the largest change of one LoRA alone
            at weight 1; a layer with more is scaled down to it. None is no limit.
    """

    limit: float | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def acting_together(self, concepts: ConceptSet, canvas: Canvas) -> Sequence[Together]:
        """All concepts, in every layer."""
        apart = ", or keep them apart: method='regional' with a region for each"
        return limited([Together(range(len(concepts.loaded)), apart)], self.limit)

    def start(self, session: Session) -> FixedPasses:
        """Constant gates for everything; text encoders take part."""
        if any(concept.region for concept in session.concepts.concepts):
            warn_once("merge ignores regions; use method='regional'")
        strengths = session.concepts.weights
        weights = session.concepts.weights_of(range(len(strengths)))
        merged = Pass(one_text(session, weights), constant_gates(session, weights))
        return FixedPasses(session, [[(merged, 1.0)]], constant=EVERYWHERE, constant_weights=strengths)
