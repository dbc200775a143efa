"""CLoRA: the tokens whose attention maps are recorded, and the concept of each map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.text.branches import Branch
from lora_compose.pipelines.text.tokens import Mention


@dataclass(frozen=True, eq=False)
class MappedTokens:
    """The tokens whose attention maps are recorded, and the concept of each map.

    Attributes:
        token_weights: One token for every map, by branch and image. Shape: [branches * images, tokens, maps].
        groups: Index of the concept of each map; -1 for none. Shape: [images, branches * maps].
        makes_mask: True if the map is a part of the branch's mask. Shape: [images, subjects, maps].
    """

    token_weights: Tensor
    groups: Tensor
    makes_mask: Tensor


def check_words(subjects: Sequence[str], **settings: Mapping[str, Sequence[str]]) -> None:
    """Checks words by name of a concept, by setting. Raises ValueError for unknown concepts, and what is no list."""
    for name, words in settings.items():
        if unknown := words.keys() - set(subjects):
            raise ValueError(f"{name} names {sorted(unknown)}; the subjects are {', '.join(subjects)}")
        if wrong := [concept for concept, listed in words.items() if isinstance(listed, str) or not listed]:
            raise ValueError(f"{name} of {wrong[0]!r} must be a list of words, not {words[wrong[0]]!r}")


def map_tokens(session: Session, branches: Sequence[Branch], mask_words: Mapping[str, Sequence[str]]) -> MappedTokens:
    """A map for every token that names a concept.

    Args:
        mask_words: By name of a concept, the words in its own branch that make its mask, instead of those that name it.

    Raises:
        ValueError: If a token names two concepts.
    """
    canvas, find = session.canvas, session.prompts.find
    rows: list[dict[int, tuple[int, bool]]] = []  # by branch and image: token -> (concept, whether it makes masks)
    for branch in branches:
        named = find(branch.prompts, branch.names, branch.mentions).phrase
        masking = _masking(session, branch, named, mask_words)
        for prompt in range(len(branch.prompts)):
            _check_apart(named[prompt], branch.prompts[prompt], session.concepts.concepts)
            named_tokens = {token: (concept, False) for token, concept in named[prompt].nonzero().tolist()}
            named_tokens |= {token: (named_tokens.get(token, (-1, False))[0], True) for token in masking[prompt]}
            rows += [named_tokens] * canvas.images_per_prompt
    most, tokens = max(map(len, rows)), session.prompts.token_masks.phrase.shape[1]
    token_weights, groups = torch.zeros(len(rows), tokens, most), torch.full((len(rows), most), -1)
    makes_mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for row, named_tokens in enumerate(rows):
        for column, (token, (concept, masks)) in enumerate(sorted(named_tokens.items())):
            token_weights[row, token, column], groups[row, column], makes_mask[row, column] = 1, concept, masks
    by_branch = (len(branches), -1)
    return MappedTokens(
        token_weights.to(canvas.device),
        groups.unflatten(0, by_branch).transpose(0, 1).flatten(1).to(canvas.device),
        makes_mask.unflatten(0, by_branch)[1:].transpose(0, 1).to(canvas.device),
    )


def _masking(
    session: Session, branch: Branch, named: Tensor, mask_words: Mapping[str, Sequence[str]]
) -> list[list[int]]:
    """The tokens that make the mask of a branch, by prompt."""
    if branch.subject is None:
        return [[] for _ in branch.prompts]
    name = session.concepts.concepts[branch.subject].name
    if name in mask_words:
        mention = {name: Mention(tuple(mask_words[name]))}
        named = session.prompts.find(branch.prompts, (), [mention] * len(branch.prompts)).phrase
    return [prompt[:, branch.subject].nonzero()[:, 0].tolist() for prompt in named]


def _check_apart(named: Tensor, prompt: str, concepts: Sequence[Concept]) -> None:
    """Raises ValueError if a token names two concepts. Shape of named: [tokens, concepts]."""
    for row in named:
        if row.sum() > 1:
            both = " and ".join(concept.name for concept, named in zip(concepts, row, strict=True) if named)
            raise ValueError(
                f"the same word of {shortened(prompt)} names {both}; clora tells concepts apart by their words"
            )
