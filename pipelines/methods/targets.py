"""LoRA-Composer: the region and the tokens of each concept, for the losses on attention maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.losses import gaussian_over
from lora_compose.pipelines.scene.regions import Regions
from lora_compose.pipelines.scene.scene import Concept


@dataclass(frozen=True, eq=False)
class Target:
    """Region and tokens of the losses of one concept.

    Attributes:
        region: 1 inside. Shape: [height, width] of the map grid.
        gaussian: Gaussian weights in the region.
        inside: Indices of its cells.
        outside: Indices of the others.
        words: The concept's tokens in its own text, one map each, padded. Shape: [images, tokens, maps].
        share: Weight of every map in the mean over the concept's tokens, 0 at the padding. Shape: [images, maps].
    """

    region: Tensor
    gaussian: Tensor
    inside: Tensor
    outside: Tensor
    words: Tensor
    share: Tensor


def targets_of(session: Session, regions: Regions, prompts: Sequence[Sequence[str]]) -> list[Target]:
    """The target of each region, with its text by prompt. ValueError if the text has no words of its concept."""
    masks = regions.cells[session.canvas.map_level].unbind(dim=-1)
    return [_target(session, *of_region) for of_region in zip(regions.indices, masks, prompts, strict=True)]


def _target(session: Session, concept: int, region: Tensor, prompts: Sequence[str]) -> Target:
    subject, canvas = session.concepts.concepts[concept], session.canvas
    words = session.prompts.find(prompts, [subject.name]).phrase[:, :, concept]
    words = words.repeat_interleave(canvas.images_per_prompt, dim=0)
    _check_words(subject, words)
    tokens = [row.nonzero()[:, 0] for row in words.cpu()]
    token_weights = torch.zeros(*words.shape, max(len(positions) for positions in tokens))
    share = torch.zeros(len(tokens), token_weights.shape[-1])
    for image, positions in enumerate(tokens):
        token_weights[image, positions, torch.arange(len(positions))] = 1
        share[image, : len(positions)] = 1 / len(positions)
    inside, outside = region.flatten().nonzero()[:, 0], (~region).flatten().nonzero()[:, 0]
    on_device = (
        x.to(canvas.device) for x in (region.float(), gaussian_over(region), inside, outside, token_weights, share)
    )
    return Target(*on_device)


def _check_words(concept: Concept, words: Tensor) -> None:
    if not words.any(dim=1).all():
        raise unmoved(concept)


def unmoved(concept: Concept) -> ValueError:
    """The error of a concept that has no words by which it could be moved."""
    return ValueError(
        f"lora-composer moves {concept.name!r} by its words: give it a trigger (and class word), or switch "
        "updates and re-initialisation off with step_size=0, reinit='off'"
    )
