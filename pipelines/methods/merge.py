"""Merge: add the LoRAs up, the baseline that everybody knows.

Every layer becomes W + sum_i w_i s_i B_i A_i, for all tokens, pixels and rows, text encoders included. With several
subjects the deltas act on each other's tokens and pixels, so identities blend or one of them wins.
"""

from dataclasses import dataclass

from attention import Gates
from pipelines.engine import Engine
from pipelines.methods.process import OnePass


@dataclass(frozen=True)
class Merge:
    """The weighted sum of all LoRAs. It has no settings and uses no regions."""

    def start(self, engine: Engine) -> OnePass:
        weights = engine.weights.tolist()
        gates = Gates(
            text=engine.weights[None, None],
            image={level: engine.weights[None, None] for level in engine.levels},
            row=engine.weights[None],
            latent_grid=engine.latent_grid,
        )
        return OnePass(engine, engine.encode(weights), gates, ("text", "image", "row"), weights)
