"""TARA: Token-Aware LoRA for Composable Personalization in Diffusion Models (arXiv 2508.08812), inference.

Token focus masking. In keys and values of cross-attention the delta of concept i acts only on the tokens of its own
trigger, m_i in {0, 1}:

    K = X W_K^T + sum_i diag(m_i) X Delta_{i,K}^T        (the same for V)

Every other adapted layer is summed without a mask. One forward pass per step whatever the number of concepts.

Beyond the paper: a weight per concept, no change of the negative prompt, and styles (`role="style"`), which act
everywhere, without a mask. A style that was trained with TARA has learned from its own words only, so it keeps its
mask.
`token_mask` makes the masks. `docs/methods/tara.md` lists the differences from the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_compose.attention import Gates, SitePart
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import (
    FixedPasses,
    Settings,
    check_choices,
    check_limit,
    one_text,
)
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.denoising.together import Together, each_subject, limited
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.support.notes import warn_once
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.missing import Described, missing_trigger
from lora_compose.pipelines.text.tokens import find_trigger

CfgMask = Literal["cond_only", "broadcast"]
Scope = Literal["all", "cross_kv"]
SUMMED: Sequence[SitePart] = ("image", "reference", "row", "modulation")
"""Parts of the sequence of layers in which all LoRAs act without a mask, unless `scope` is "cross_kv"."""


@dataclass(frozen=True)
class Tara(Settings):
    """Every LoRA acts on its own words: token masks on its deltas of cross-attention keys and values.

    Attributes:
        cfg_mask: Where the masked deltas act under guidance. "cond_only": on conditional rows, as in training.
            "broadcast": also at the same positions of the negative prompt, whatever its words, as in the authors' code.
        scope: Which layers a LoRA changes. "all": every layer it has factors for. "cross_kv": only keys and values of
            cross-attention, as in the paper's figure; complete isolation, but less of the identity.
        limit: The most that LoRAs which act on the same cells or words may change a layer together, as a multiple of
            the largest change of one alone at weight 1; those of a layer with more are scaled down to it. None is no
            limit.
    """

    cfg_mask: CfgMask = "cond_only"
    scope: Scope = "all"
    limit: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self.limit)

    @classmethod
    def official(cls) -> "Tara":
        """The settings of the authors' inference code."""
        return cls(cfg_mask="broadcast")

    def acting_together(self, concepts: ConceptSet, canvas: Canvas) -> Sequence[Together]:
        """Each subject with all styles where gates are masked; with a limit, all where cells have every LoRA."""
        if len(concepts.subjects) < 2:
            return limited(each_subject(concepts), self.limit)
        sites = canvas.backbone.sites
        summed = {name for name, site in sites.items() if not set(SUMMED).isdisjoint(site.parts)}
        groups = [replace(group, layers=sites.keys() - summed) for group in each_subject(concepts)]
        if self.scope == "all" and self.limit is not None:
            groups.append(Together(range(len(concepts.loaded)), layers=summed))
        return limited(groups, self.limit)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """Each LoRA with a mask needs a trigger that is in every prompt."""
        for each in concepts:
            if prompts is None or _everywhere(each) or each.concept.is_bystander:
                continue
            if not all(find_trigger(each.concept, prompt) for prompt in prompts):
                raise _unnamed(each)

    def start(self, session: Session) -> FixedPasses:
        """Makes one pass with token masks on the text and constant gates elsewhere."""
        concepts, canvas = session.concepts, session.canvas
        self.check_concepts(concepts.loaded, session.prompts.texts)
        _check(session)
        unmasked = [i for i, loaded in enumerate(concepts.loaded) if _everywhere(loaded)]
        text = one_text(session, concepts.weights_of(unmasked))
        weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)[None]
        mask = token_mask(text, unmasked, broadcast=self.cfg_mask == "broadcast")
        other = weights if self.scope == "all" else torch.zeros_like(weights)
        gates = Gates(
            text=mask * weights[:, None],
            image=dict.fromkeys(canvas.levels, other[:, None]),
            row=other,
            latent_grid=canvas.latent_grid,
        )
        constant = concepts.weights if self.scope == "all" else [0.0] * len(concepts.weights)
        return FixedPasses(session, [[(Pass(text, gates), 1.0)]], constant=SUMMED, constant_weights=constant)


def token_mask(text: Conditioning, unmasked: Sequence[int], *, broadcast: bool) -> Tensor:
    """The masks m_i: 1 at the tokens of each concept's trigger.

    Args:
        unmasked: Concepts without a mask.
        broadcast: Whether unconditional rows get the masks of conditional rows instead of zeros.

    Returns:
        Shape: [rows, tokens, concepts].
    """
    mask = text.trigger_mask
    if broadcast and text.guided:
        mask = mask.clone()
        mask[text.roles.unconditional] = mask[text.roles.conditional]
    return mask.index_fill(-1, torch.tensor(unmasked, dtype=torch.long, device=mask.device), 1)


def _everywhere(described: Described) -> bool:
    """Whether a concept has no mask: a style that was trained without one."""
    return described.concept.is_style and described.trained_with != "tara"


def _unnamed(described: Described) -> ValueError:
    lacks = "" if described.concept.trigger else f". {missing_trigger(described, ())}"
    return ValueError(
        f"tara needs to know the words of concept {described.concept.name!r}: give it a trigger that is in every prompt"
        f" (with prompt_embeds: its token_positions){lacks}"
    )


def _check(session: Session) -> None:
    present = session.prompts.token_masks.trigger.sum(dim=1) > 0
    for i, loaded in enumerate(session.concepts.loaded):
        if not (_everywhere(loaded) or loaded.concept.is_bystander):
            _check_masked(loaded, bool(present[:, i].all()))


def _check_masked(loaded: LoadedConcept, named: bool) -> None:
    """Checks a concept with a token mask; `named` is whether its words are in every prompt."""
    name = loaded.concept.name
    if not named:
        raise _unnamed(loaded)
    if not loaded.factors.model:
        raise ValueError(f"concept {name!r} changes only the text encoder, which tara leaves alone; use method='merge'")
    if loaded.factors.text_encoders:
        warn_once(f"tara leaves out the text-encoder part of {name!r}: it would change every later token")
    if loaded.concept.region is not None:
        warn_once(f"tara ignores the region of {name!r}; use method='regional'")
    if loaded.trained_with != "tara":
        warn_once(f"{name!r} does not say that it was trained with TARA: tara is a plain token mask for it")
