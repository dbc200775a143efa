"""TARA: Token-Aware LoRA for Composable Personalization in Diffusion Models (arXiv 2508.08812), inference.

Token focus masking. In keys and values of cross-attention the delta of concept i acts only on the tokens of its own
trigger, m_i in {0, 1}:

    K = X W_K^T + sum_i diag(m_i) X Delta_{i,K}^T        V likewise

Every other adapted layer is summed without a mask. One UNet pass per step whatever the number of concepts.

Beyond the paper: a weight per concept, the negative prompt left alone, and styles (`role="style"`), which act
everywhere, without a mask. One that was trained with TARA knows its own words only, so it keeps its mask, as all do in
the paper.
`docs/methods/tara.md` says what differs from the authors' code and why.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lora_compose.attention import Gates
from lora_compose.pipelines.engine import Engine, LoadedConcept
from lora_compose.pipelines.methods.process import OnePass, one_text, say_once

CfgMask = Literal["cond_only", "broadcast"]
Scope = Literal["all", "cross_kv"]


@dataclass(frozen=True)
class Tara:
    """Every LoRA acts on its own words: token masks on its deltas of cross-attention keys and values.

    Attributes:
        cfg_mask: Where the masked deltas act under guidance. "cond_only": on the prompt's rows, which is what training
            saw. "broadcast": also at the same positions of the negative prompt, whatever stands there, as the authors'
            code does.
        scope: Which layers a LoRA changes. "all": every layer it has factors for. "cross_kv": keys and values of
            cross-attention alone, as the paper's figure draws it; complete isolation, less of the identity.
    """

    cfg_mask: CfgMask = "cond_only"
    scope: Scope = "all"

    def __post_init__(self) -> None:
        for name, allowed in (("cfg_mask", get_args(CfgMask)), ("scope", get_args(Scope))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @classmethod
    def official(cls) -> "Tara":
        """What the authors' inference code does."""
        return cls(cfg_mask="broadcast")

    def start(self, engine: Engine) -> OnePass:
        """Token masks for keys and values, constant gates for everything else."""
        _check(engine)
        free = [i for i, loaded in enumerate(engine.loaded) if _everywhere(loaded)]
        in_text = [[i for i in mine if i in free] for mine in engine.members]
        conditioning = one_text(engine, engine.weights_of(in_text))
        mask = conditioning.trigger_mask
        if self.cfg_mask == "broadcast" and conditioning.guided:
            mask = torch.cat([mask[conditioning.conditional_rows]] * 2)
        mask = mask.index_fill(-1, torch.tensor(free, dtype=torch.long, device=mask.device), 1)
        weights = engine.by_row(engine.weights_of(), conditioning)
        unmasked = weights if self.scope == "all" else torch.zeros_like(weights[:1])
        gates = Gates(
            text=mask * weights[:, None],
            image=dict.fromkeys(engine.levels, unmasked[:, None]),
            row=unmasked,
            latent_grid=engine.latent_grid,
        )
        if len(unmasked) > 1:
            return OnePass(engine, conditioning, gates)
        constant = engine.weights if self.scope == "all" else [0.0] * len(engine.weights)
        return OnePass(engine, conditioning, gates, ("image", "row"), constant)


def _everywhere(loaded: LoadedConcept) -> bool:
    """Whether a concept has no mask: a style that was trained without one."""
    return loaded.concept.is_style and loaded.trained_with != "tara"


def _check(engine: Engine) -> None:
    present = engine.token_masks.trigger.sum(dim=1) > 0
    for i, loaded in enumerate(engine.loaded):
        if not _everywhere(loaded):
            found = all(present[prompt, i] for prompt, mine in enumerate(engine.members) if i in mine)
            _check_masked(loaded, found)


def _check_masked(loaded: LoadedConcept, found: bool) -> None:
    """Checks a concept that acts on its own words; found is whether they stand in every prompt."""
    name = loaded.concept.name
    if not found:
        raise ValueError(
            f"tara needs to know the words of concept {name!r}: give it a trigger that stands in every prompt"
            " (with prompt_embeds: its token_positions)"
        )
    if not loaded.factors.unet:
        raise ValueError(f"concept {name!r} changes only the text encoder, which tara leaves alone; use method='merge'")
    if loaded.factors.text_encoders:
        say_once(f"tara leaves out the text-encoder part of {name!r}: it would change every later token")
    if loaded.concept.region is not None:
        say_once(f"tara has no use for the region of {name!r}; method='regional' has")
    if loaded.trained_with != "tara":
        say_once(f"{name!r} does not say that it was trained with TARA: tara is a plain token mask for it")
