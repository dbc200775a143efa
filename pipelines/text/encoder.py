"""Encodes prompts with the text-encoder part of the LoRAs, and finds the concepts' words in them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention import BankCache, Gates, Site, installed_layers, scatter_concepts
from lora_compose.attention.device import to_device
from lora_compose.attention.sites import SitePart
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.models import TEXT_ENCODERS
from lora_compose.pipelines.scene.canvas import Canvas, images_of
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.conditioning import Conditioning, TokenMasks, join_rows
from lora_compose.pipelines.text.emphasis import weights_of
from lora_compose.pipelines.text.tokens import Mention


@dataclass(frozen=True)
class EncodedText:
    """Output of a pipeline's text encoders, one row per image.

    Attributes:
        prompt_embeds: Shape: [images, tokens, channels]; layers * channels if each cross-attention layer has a text of
            its own.
        negative_prompt_embeds: Embeddings of the negative prompts; None without guidance.
        added: Further inputs of the model for the prompts. Shape: [images, ...] each.
        negative_added: The same inputs for the negative prompts; None without guidance.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    added: Mapping[str, Tensor] | None = None
    negative_added: Mapping[str, Tensor] | None = None

    def of_images(self, images: Sequence[int]) -> "EncodedText":
        """The text of some images."""

        def of(added: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
            return None if added is None else {name: rows[images] for name, rows in added.items()}

        negative = self.negative_prompt_embeds
        embeds = self.prompt_embeds[images], None if negative is None else negative[images]
        return EncodedText(*embeds, of(self.added), of(self.negative_added))


Encoder = Callable[[Sequence[str] | None, Sequence[str] | None], EncodedText]
"""Encodes prompts and negative prompts with a pipeline's text encoders; None means the call's own."""

FamilyEncoder = Callable[[Sequence[str] | None, Sequence[str] | None, torch.device], EncodedText]
"""An encoder with the device to run on, which diffusers would otherwise search for in each call."""

TextEncoder = Callable[[Tensor | None, Sequence[str] | None, Sequence[str] | None], EncodedText]
"""An encoder with the weights of the LoRAs of the text encoders first."""

Finder = Callable[
    [Sequence[Concept], Sequence[str], Collection[str], Sequence[Mapping[str, Mention]] | None], TokenMasks
]
"""Finds the words of concepts in prompts: the triggers of the concepts named in the third argument, and by prompt other
words that name a concept. All must be present."""


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes all prompts of a call, with the text-encoder LoRAs of all its concepts; equal texts are encoded once.

    Attributes:
        steps: Number of steps, for the mean of weight schedules.
        banks: Keeps the LoRAs of text encoders between calls.
    """

    concepts: ConceptSet
    components: Mapping[str, Any]
    encode: Encoder
    canvas: Canvas
    steps: int
    banks: BankCache
    _encoded: dict[tuple, EncodedText] = field(default_factory=dict)

    def __call__(
        self, weights: Tensor | None, prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None
    ) -> EncodedText:
        """Encodes prompts with the text-encoder LoRAs of the concepts.

        Args:
            weights: Weights of the text-encoder LoRAs; None leaves them out. Shape: [concepts].
            prompts: Instead of the call's own.
            negative_prompts: Instead of the call's own.
        """
        gates = self._gates(weights)
        key = gates, _value(prompts), _value(negative_prompts)
        if key not in self._encoded:
            with ExitStack() as stack:
                for part in TEXT_ENCODERS:
                    if self.components.get(part) is not None:
                        stack.enter_context(self._adapted(part, gates))
                self._encoded[key] = self.encode(prompts, negative_prompts)
        return self._encoded[key]

    def _gates(self, weights: Tensor | None) -> tuple[float, ...] | None:
        """The gate of each concept's text-encoder LoRA; None if all are 0, so that nothing need be installed."""
        if weights is None:
            return None
        pairs = zip(weights.tolist(), self.concepts.loaded, strict=True)
        acting = [weight != 0 and bool(loaded.factors.text_encoders) for weight, loaded in pairs]
        gates = weights * self.concepts.text_factors(acting, self.steps) * torch.tensor(acting)
        return tuple(gates.tolist()) if gates.any() else None

    @contextmanager
    def _adapted(self, part: Part, gates: tuple[float, ...] | None) -> Iterator[None]:
        model: nn.Module = self.components[part]
        concepts = self.concepts.loaded
        loras = [{} if gates is None else loaded.factors.text_encoders.get(part, {}) for loaded in concepts]
        parts: dict[str, SitePart] = {"text_projection": "row"}  # its input is one vector of the whole prompt
        where = {name: Site(parts.get(name, "text")) for lora in loras for name in lora}
        # Adapters of these names are replaced by the concepts, also by those that come from a file.
        names = [concept.name for concept in self.concepts.concepts]
        dtype: torch.dtype = model.dtype  # pyright: ignore[reportAssignmentType]
        with installed_layers(
            model, loras, where, device=self.canvas.device, dtype=dtype, silence=names,
            kept=self.concepts.kept(part, self.banks) if any(loras) else None,
        ) as installation:  # fmt: skip
            if gates is not None:
                gate = to_device(torch.tensor(gates), self.canvas.device)[None]
                installation.use(installation.inputs(Gates(gate[:, None], {}, gate, (1, 1))))
            yield


def _value(texts: Sequence[str] | None) -> tuple[tuple[str, tuple[float, ...]], ...] | None:
    """What an encoder reads of texts; equal ones may differ in weights."""
    return None if texts is None else tuple((text, weights_of(text)) for text in texts)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one concept set.

    Attributes:
        texts: The prompts; None if the call was given embeddings.
        token_masks: Positions of the words of the set's concepts in the prompts.
        encoder: Encodes all prompts of the call.
        indices: Indices of these prompts among those of the call.
    """

    texts: tuple[str, ...] | None
    token_masks: TokenMasks
    concepts: ConceptSet
    encoder: TextEncoder
    finder: Finder
    indices: tuple[int, ...]
    canvas: Canvas

    def encode(
        self,
        weights: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        names: Collection[str] = (),
        mentions: Sequence[Mapping[str, Mention]] | None = None,
    ) -> Conditioning:
        """Encodes the prompts, or others that replace them one by one.

        Args:
            weights: Weights of the text-encoder LoRAs; None leaves them out. Shape: [concepts].
            prompts: Instead of the call's own.
            negative_prompts: Instead of the call's own.
            names: Concepts whose words are looked for in those prompts.
            mentions: By prompt, other words that name a concept.

        Raises:
            ValueError: If a trigger is missing.
        """
        masks = self.token_masks if prompts is None else self.find(prompts, names, mentions)
        text = self.encoder(
            self._for_all_concepts(weights), self._for_all_prompts(prompts), self._for_all_prompts(negative_prompts)
        )
        if len(self.indices) < self.canvas.prompts:
            text = text.of_images(images_of(self.indices, self.canvas.images_per_prompt))
        return self._conditioning(text, masks)

    def find(
        self, prompts: Sequence[str], names: Collection[str], mentions: Sequence[Mapping[str, Mention]] | None = None
    ) -> TokenMasks:
        """Positions of the named concepts' words, and others' mentioned ones. Raises ValueError if one is missing."""
        return self.finder(self.concepts.concepts, prompts, names, mentions)

    def _for_all_concepts(self, weights: Tensor | None) -> Tensor | None:
        if weights is None or self.concepts.columns is None:
            return weights
        return scatter_concepts(weights, self.concepts.columns, self.concepts.installed)

    def _for_all_prompts(self, texts: Sequence[str] | None) -> list[str] | None:
        """The texts in a batch of the call's size; rows of other prompts are not used, and empty."""
        if texts is None:
            return None
        by_prompt = dict(zip(self.indices, texts, strict=True))
        return [by_prompt.get(prompt, "") for prompt in range(self.canvas.prompts)]

    def _conditioning(self, text: EncodedText, masks: TokenMasks) -> Conditioning:
        embeds, negative = text.prompt_embeds, text.negative_prompt_embeds
        trigger, phrase = (
            join_rows(None if negative is None else torch.zeros_like(mask), [mask], self.canvas.images_per_prompt)
            for mask in (masks.trigger.to(self.canvas.device), masks.phrase.to(self.canvas.device))
        )
        added, of_negative = text.added, text.negative_added
        if added is not None and of_negative is not None:
            added = {name: torch.cat([of_negative[name], rows]) for name, rows in added.items()}
        return Conditioning(
            embeds if negative is None else torch.cat([negative, embeds]),
            trigger,
            phrase,
            Rows.of(embeds.shape[0], 0 if negative is None else 1),
            added=added,
        )
