"""The text of one forward pass: embeddings and token masks of all rows."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention import scatter_concepts
from lora_compose.pipelines.scene.rows import Rows, Selection
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.tokens import (
    Mention,
    Tokenizer,
    check_disjoint,
    find_trigger,
    locate,
    locate_mention,
    own_nouns,
    token_mask,
)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The text of all rows of one forward pass.

    Unconditional rows exist only with guidance, for all branches or for each. Images of one prompt are adjacent. With
    region attention among several texts, all tensors have the texts as a leading dimension (`stack_texts`).

    Attributes:
        prompt_embeds: Shape: [(texts,) rows, tokens, channels]; layers * channels if each cross-attention layer has a
            text of its own.
        trigger_mask: 1 at the tokens of each concept's trigger; unconditional rows are 0. Shape: [(texts,) rows,
            tokens, concepts].
        phrase_mask: The mask of trigger and class word together.
        roles: Image and branch of each row, and whether it is conditional.
        added: Further inputs of the model by row (SDXL's pooled text and sizes). On the CPU "lengths", tokens of rows
            that have fewer than others, and "read", tokens that attention sees where a row is padded further.
        canvas_embeds: A text for the whole image, read by ControlNets; None means the first text. Shape: [rows, tokens,
            channels].
        several_texts: Whether there is a dimension of texts.
    """

    prompt_embeds: Tensor
    trigger_mask: Tensor
    phrase_mask: Tensor
    roles: Rows
    added: Mapping[str, Tensor] | None = None
    canvas_embeds: Tensor | None = None
    several_texts: bool = False

    @property
    def guided(self) -> bool:
        """True if there are unconditional rows."""
        return not all(row.conditional for row in self.roles.each)

    @property
    def images(self) -> int:
        """Images in the batch."""
        return self.roles.images

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return self.prompt_embeds.shape[-3]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens in each row."""
        if self.added is not None and "lengths" in self.added:
            return tuple(self.added["lengths"].tolist())
        return (self.prompt_embeds.shape[-2],) * self.rows

    @property
    def read(self) -> tuple[int, ...] | None:
        """Number of tokens of each row that attention sees; None means all of them."""
        return None if self.added is None or "read" not in self.added else tuple(self.added["read"].tolist())

    @property
    def text_mask(self) -> Tensor:
        """True at tokens that are read; everywhere if the pipeline gives no mask. Shape: [rows, tokens]."""
        embeds, added = self.first_embeds, self.added or {}
        if "text_mask" in added:
            return added["text_mask"].bool()
        if "lengths" in added or "read" in added:
            lengths = added["read" if "read" in added else "lengths"].to(embeds.device)
            return torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
        return embeds.new_ones(embeds.shape[:2], dtype=torch.bool)

    @property
    def end(self) -> int:
        """Number of tokens up to the last one that is not padding, in any row; at least 1."""
        real = self.text_mask.any(dim=0).nonzero()
        return int(real[-1]) + 1 if len(real) else 1

    @property
    def first_embeds(self) -> Tensor:
        """The embeddings of the first text. Shape: [rows, tokens, channels]."""
        return self.prompt_embeds[0] if self.several_texts else self.prompt_embeds

    @property
    def canvas_text(self) -> Tensor:
        """The embeddings for the image as a whole. Shape: [rows, tokens, channels]."""
        return self.first_embeds if self.canvas_embeds is None else self.canvas_embeds

    def up_to(self, end: int) -> "Conditioning":
        """The first tokens of one text, which has a mask."""
        added = dict(self.added or {})
        added["text_mask"] = added["text_mask"][:, :end]
        embeds, trigger, phrase = (x[:, :end] for x in (self.prompt_embeds, self.trigger_mask, self.phrase_mask))
        return replace(self, prompt_embeds=embeds, trigger_mask=trigger, phrase_mask=phrase, added=added)

    def conditional(self) -> "Conditioning":
        """The text without the unconditional rows."""
        return self.select(self.roles.conditional)

    def of_image(self, image: int) -> "Conditioning":
        """The rows of one image."""
        return self.select(self.roles.where(lambda row: row.image == image))

    def described_by(self, other: "Conditioning") -> "Conditioning":
        """The texts for the cells, with another text for the whole image (SDXL's pooled text, ControlNets)."""
        return replace(self, added=other.added, canvas_embeds=other.canvas_text)

    def scatter_concepts(self, columns: Sequence[int], concepts: int) -> "Conditioning":
        """The text with masks of a larger concept set; those of other concepts are empty (`Gates`)."""
        trigger, phrase = (scatter_concepts(mask, columns, concepts) for mask in (self.trigger_mask, self.phrase_mask))
        return replace(self, trigger_mask=trigger, phrase_mask=phrase)

    def of_branches(self, branches: slice) -> "Conditioning":
        """The text of some branches."""
        return self.select(slice(branches.start * self.images, branches.stop * self.images))

    def on_part(self, height: float, width: float) -> "Conditioning":
        """The text for a part of the canvas, given as fractions: SDXL takes the image size as an input."""
        if self.added is None or "time_ids" not in self.added:
            return self
        sizes = self.added["time_ids"]  # target height and width are the last two
        shares = torch.ones(sizes.shape[-1], device=sizes.device)
        shares[-2:] = torch.tensor([height, width])
        scaled = (sizes * shares).round().to(sizes.dtype)
        return replace(self, added={**self.added, "time_ids": scaled})

    def select(self, rows: Selection) -> "Conditioning":
        """The text of some rows."""
        added = self.added
        return replace(
            self,
            roles=self.roles.select(rows),
            prompt_embeds=self.prompt_embeds[..., rows, :, :],
            trigger_mask=self.trigger_mask[..., rows, :, :],
            phrase_mask=self.phrase_mask[..., rows, :, :],
            added=None if added is None else {key: value[rows] for key, value in added.items()},
            canvas_embeds=None if self.canvas_embeds is None else self.canvas_embeds[rows],
        )


def stack_texts(texts: Sequence[Conditioning]) -> Conditioning:
    """Several texts for region attention; further inputs of the model come from the first."""
    return replace(
        texts[0],
        prompt_embeds=torch.stack([text.prompt_embeds for text in texts]),
        trigger_mask=torch.stack([text.trigger_mask for text in texts]),
        phrase_mask=torch.stack([text.phrase_mask for text in texts]),
        several_texts=True,
    )


def join_branches(branches: Sequence[Conditioning], unconds: Sequence[Conditioning]) -> Conditioning:
    """Several texts of the same images as branches of one batch.

    Args:
        branches: Texts with one branch each.
        unconds: The texts whose unconditional rows are kept: one, or all.
    """

    def join(rows_of: Callable[[Conditioning], Tensor]) -> Tensor:
        first = [rows_of(branch)[branch.roles.unconditional] for branch in unconds]
        return torch.cat([*first, *(rows_of(branch)[branch.roles.conditional] for branch in branches)])

    guided = [branch for branch in unconds if branch.guided]
    return replace(_joined(branches[0], join), roles=Rows.of(branches[0].images, len(guided), len(branches)))


def join_images(texts: Sequence[Conditioning], images: Sequence[Sequence[int]]) -> Conditioning:
    """The texts of several groups of images, with as many branches each, as the text of all images.

    They are without region attention; `images` are those of each group.
    """
    total = sum(map(len, images))
    return replace(
        _joined(texts[0], lambda rows_of: join_rows_of_images(list(map(rows_of, texts)), images)),
        roles=texts[0].roles.of_images(total),
    )


def join_rows_of_images(parts: Sequence[Tensor], images: Sequence[Sequence[int]]) -> Tensor:
    """Rows of groups of images, [branches * images of the group, ...] each, as those of all images in their order."""
    order = torch.tensor([image for group in images for image in group]).argsort()
    by_branch = [part.unflatten(0, (-1, len(group))) for part, group in zip(parts, images, strict=True)]
    return torch.cat(by_branch, dim=1)[:, order].flatten(0, 1)


def _joined(first: Conditioning, join: Callable[[Callable[[Conditioning], Tensor]], Tensor]) -> Conditioning:
    """The first of several texts, with the joined rows of all of them."""
    added = first.added
    return replace(
        first,
        prompt_embeds=join(lambda text: text.prompt_embeds),
        trigger_mask=join(lambda text: text.trigger_mask),
        phrase_mask=join(lambda text: text.phrase_mask),
        added=None if added is None else {key: join(lambda text, key=key: (text.added or {})[key]) for key in added},
    )


TokenPositions = Mapping[str, Sequence[int] | Sequence[Sequence[int]]]
"""Token positions of the trigger by concept: one list for all prompts, or one per prompt."""


@dataclass(frozen=True, eq=False)
class TokenMasks:
    """Masks of the concepts' tokens by prompt. Shape: [prompts, tokens, concepts] each, fp32."""

    trigger: Tensor
    phrase: Tensor

    @classmethod
    def of_prompts(
        cls,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        concepts: Sequence[Concept],
        names: Container[str] | None = None,
        optional: Container[str] = (),
        mentions: Sequence[Mapping[str, Mention]] | None = None,
    ) -> "TokenMasks":
        """Finds triggers and class words; without a trigger masks are empty, but for the phrase of a bystander.

        Args:
            concepts: Concepts whose words are looked for.
            names: Only these concepts are looked for; None means all.
            optional: Concepts whose trigger may be missing.
            mentions: By prompt, words that name a concept; they replace trigger and class word as its phrase.

        Raises:
            ValueError: For triggers that are missing, truncated or shared, and mentions that are missing or truncated.
        """
        wanted = [c for c in concepts if c.trigger and (names is None or c.name in names)]
        trigger, phrase = [], []
        for prompt, mentioned in zip(prompts, mentions or [{}] * len(prompts), strict=True):
            named = [c for c in wanted if c.name not in optional or find_trigger(c, prompt)]
            positions = {concept.name: locate(tokenizer, prompt, concept, concepts) for concept in named}
            check_disjoint(named, list(positions.values()), prompt)
            trigger.append([positions[c.name].trigger if c.name in positions else () for c in concepts])
            phrases = {name: place.phrase for name, place in positions.items()}
            others = {**_bystanders(prompt, concepts, names), **mentioned}
            phrases |= {
                c.name: locate_mention(tokenizer, prompt, c, others[c.name], concepts)
                for c in concepts
                if c.name in others
            }
            phrase.append([phrases.get(c.name, ()) for c in concepts])
        tokens = tokenizer.model_max_length
        return cls(token_mask(trigger, tokens), token_mask(phrase, tokens))

    @classmethod
    def of_positions(
        cls,
        positions: TokenPositions,
        prompts: int,
        tokens: int,
        concepts: Sequence[Concept],
        indices: Sequence[int] | None = None,
    ) -> "TokenMasks":
        """Masks from the `token_positions` given with `prompt_embeds`.

        Args:
            prompts: Prompts of the call.
            tokens: Tokens of each.
            indices: The prompts whose masks are made; None means all.

        Raises:
            ValueError: For unknown concepts, positions outside the embeddings or shared ones.
        """
        unknown = positions.keys() - {concept.name for concept in concepts}
        if unknown:
            raise ValueError(f"token_positions names {sorted(unknown)}, which are not among the concepts of this call")
        indices = range(prompts) if indices is None else indices
        rows: list[list[tuple[int, ...]]] = [[] for _ in indices]
        for concept in concepts:
            listed = positions.get(concept.name, ())
            nested = [tuple(p) if isinstance(p, Sequence) else p for p in listed]
            per_prompt = nested if nested and isinstance(nested[0], tuple) else [tuple(nested)] * prompts
            if len(per_prompt) != prompts:
                raise ValueError(
                    f"token_positions of {concept.name!r} are for {len(per_prompt)} prompts, there are {prompts}"
                )
            for row, index in zip(rows, indices, strict=True):
                row.append(per_prompt[index])  # pyright: ignore[reportArgumentType]
        if any(not 0 <= p < tokens for row in rows for places in row for p in places):
            raise ValueError(f"token_positions must lie between 0 and {tokens - 1}")
        mask = token_mask(rows, tokens)
        if (mask.sum(dim=2) > 1).any():
            raise ValueError("token_positions of two concepts share a token")
        return cls(mask, mask)


def _bystanders(prompt: str, concepts: Sequence[Concept], names: Container[str] | None) -> dict[str, Mention]:
    """How a prompt names the bystanders that are looked for and are in it.

    The text about one of several with one class word has a single noun, which is its own.
    """
    wanted = [c for c in concepts if c.is_bystander and (names is None or c.name in names)]
    which = {c.name: own_nouns(c, prompt, concepts) for c in wanted}
    if names is not None:
        others = [c for c in concepts if not c.is_bystander]
        which |= {c.name: own_nouns(c, prompt, [*others, c]) for c in wanted if not which[c.name]}
    return {c.name: Mention((c.class_word or "",), which[c.name]) for c in wanted if which[c.name]}


def agreed(masks: Sequence[TokenMasks], concepts: Sequence[Concept]) -> TokenMasks:
    """The masks of one prompt; those of all tokenizers must be equal.

    The features of both encoders are concatenated per token, and a token gate cannot separate them. Raises ValueError
    if a concept's words have different positions.
    """
    first, *others = masks
    for other in others:
        here, there = first.trigger.shape[1], other.trigger.shape[1]
        if here != there:
            raise ValueError(f"the two tokenizers read {here} and {there} tokens; expected the same number")
        apart = ((first.trigger != other.trigger) | (first.phrase != other.phrase)).any(dim=1).any(dim=0)
        if apart.any():
            names = ", ".join(repr(concept.name) for concept, differs in zip(concepts, apart, strict=True) if differs)
            raise ValueError(
                f"the words of {names} have other token positions for the second tokenizer; write prompt_2 so that "
                "they have the same ones as in the prompt, or leave it out (load textual inversions into both)"
            )
    return first


def join_rows(uncond: Tensor | None, branches: Sequence[Tensor], images_per_prompt: int) -> Tensor:
    """Rows (unconditional, branch 0, ...) from one mask per prompt and branch; prompts are repeated for their images.

    Args:
        uncond: Values of the unconditional rows, by prompt; None without guidance.
        branches: One tensor per branch. Shape: [prompts, ...].
        images_per_prompt: How many images each prompt gets.
    """
    parts = [*([] if uncond is None else [uncond]), *branches]
    return torch.cat([part.repeat_interleave(images_per_prompt, dim=0) for part in parts])
