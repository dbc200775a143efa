"""Merge: add the LoRAs up, the baseline that everybody knows.

Every layer becomes W + sum_i w_i s_i B_i A_i, for all tokens, pixels and rows, text encoders included. With several
subjects the deltas act on each other's tokens and pixels, so identities blend or one of them wins. Styles act
everywhere, so other methods do the same where a scene has no subjects.
"""

from dataclasses import dataclass

from lora_compose.pipelines.engine import Engine
from lora_compose.pipelines.methods.process import OnePass, constant_gates, one_text, say_once


@dataclass(frozen=True)
class Merge:
    """All LoRAs are added up, as every tool does it; there are no settings."""

    def start(self, engine: Engine) -> OnePass:
        """Constant gates for everything; text encoders take part."""
        if any(concept.region for concept in engine.concepts):
            say_once("merge has no use for regions; method='regional' has")
        weights = engine.weights_of()
        conditioning = one_text(engine, weights)
        gates = constant_gates(engine, weights, conditioning)
        if len(weights) > 1:
            return OnePass(engine, conditioning, gates)
        return OnePass(engine, conditioning, gates, ("text", "image", "row"), engine.weights)
