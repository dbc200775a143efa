"""Words bundled with LoRA files (textual inversions), added to the text encoders during one call.

Every word gets tokens of its own in copies of the tokenizers, and these get the file's vectors in place of the text
encoder's. A word may have one vector for each cross-attention layer of the model (P+, arXiv 2303.09522; ED-LoRA, arXiv
2305.18292): the text is encoded once for each, and every layer reads its own.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, takewhile
from typing import Any, Protocol

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from lora_compose.attention.claims import Journal, undoing
from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.text.encoder import EncodedText, Encoder
from lora_compose.pipelines.text.tokens import find_words

TOKENIZERS: Mapping[str, Part] = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}


class ReadsText(Protocol):
    """A pipeline whose tokenizers and text encoders are attributes of diffusers' names."""

    maybe_convert_prompt: Any

    @property
    def model(self) -> Any:
        """The UNet or transformer."""
        ...

    @property
    def runs_on(self) -> torch.device:
        """The device on which the text encoders run."""
        ...


@dataclass(frozen=True, eq=False)
class TextualInversions:
    """The words bundled with the LoRA files of a call, and their vectors.

    Attributes:
        tokenizers: By component name; with words, copies that have tokens for them.
        vectors: By text encoder, in the order of the tokens. Shape: [layers, tokens, width].
        layers: Number of layers that read a text of their own; 1 if all read the same.
    """

    words: tuple[str, ...]
    tokenizers: Mapping[str, Any]
    vectors: Mapping[str, Tensor]
    layers: int

    @classmethod
    def of(cls, concepts: Sequence[LoadedConcept], components: Mapping[str, Any]) -> "TextualInversions":
        """The words in these concepts' files, for a pipeline with these components.

        Raises:
            ValueError: If two concepts have different vectors for a word, or a tokenizer has the word already.
        """
        tokenizers = {name: components[name] for name in TOKENIZERS if components.get(name) is not None}
        parts: list[Part] = [part for part in TOKENIZERS.values() if components.get(part) is not None]
        brought = {part: words for part in parts if (words := _brought(concepts, part))}
        layers = max((vectors.shape[1] for words in brought.values() for vectors in words.values()), default=1)
        by_part = {}
        for name, tokenizer in tokenizers.items():
            if words := brought.get(TOKENIZERS[name]):
                tokenizers[name] = _with_words(tokenizer, {word: len(vectors) for word, vectors in words.items()})
                stacked = torch.cat([vectors.expand(-1, layers, -1) for vectors in words.values()])
                by_part[TOKENIZERS[name]] = stacked.transpose(0, 1)
        return cls(tuple({word: None for words in brought.values() for word in words}), tokenizers, by_part, layers)

    def expander(self, convert: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Replacement of a pipeline's `maybe_convert_prompt`, which writes every word as all its tokens.

        Args:
            convert: The pipeline's own, which does so with the user's textual inversions.
        """

        @cache
        def known_to(tokenizer: Any) -> tuple[Mapping[str, str], bool]:
            added = tokenizer.added_tokens_encoder  # which is built anew each time that it is asked for
            written: set[str] = set()
            spelled = {}
            for word in self.words:
                names = [word, *takewhile(added.__contains__, (_further(word, i) for i in count(1)))]
                written.update(names)
                if len(names) > 1 or "_" in word:  # the prompt may have spaces for underscores
                    spelled[word] = " ".join(names)
            return spelled, any(name.endswith("_1") and name not in written for name in added)

        def expand(prompt: str | list[str], tokenizer: Any) -> Any:
            if isinstance(prompt, list):
                return [expand(text, tokenizer) for text in prompt]
            spelled, users_have_several = known_to(tokenizer)
            for word, tokens in spelled.items():
                for start, end in reversed(find_words(word, prompt)):
                    prompt = prompt[:start] + tokens + prompt[end:]
            return convert(prompt, tokenizer) if users_have_several else prompt

        return expand

    def read_by(self, pipe: ReadsText, encode: Encoder) -> Encoder:
        """Wraps an encoder of a pipeline so that it reads these words.

        If layers read texts of their own, these are concatenated along the channels: [images, tokens, layers *
        channels]. Pooled text is that of the first layer.
        """
        if not self.vectors:
            return encode

        def read(prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None) -> EncodedText:
            with self._known_to(pipe) as embeddings:
                texts = [encode(prompts, negative_prompts)]
                if not any(embedding.met for embedding in embeddings):  # then all layers read the same
                    return _side_by_side(texts * self.layers)
                for layer in range(1, self.layers):
                    for embedding in embeddings:
                        embedding.read_layer = layer
                    texts.append(encode(prompts, negative_prompts))
            return _side_by_side(texts)

        return read

    @contextmanager
    def _known_to(self, pipe: ReadsText) -> Iterator[list["WordEmbedding"]]:
        """Inside this block the pipeline's tokenizers and text encoders have the words."""
        embeddings = []
        with undoing(pipe.model) as undo:
            expand = self.expander(pipe.maybe_convert_prompt)
            undo.callback(vars(pipe).pop, "maybe_convert_prompt", None)
            pipe.maybe_convert_prompt = expand
            for name, part in TOKENIZERS.items():
                if part not in self.vectors:
                    continue
                undo.callback(setattr, pipe, name, getattr(pipe, name))
                setattr(pipe, name, self.tokenizers[name])
                model: Any = uncompiled(getattr(pipe, part))
                original = model.get_input_embeddings()
                vectors = self.vectors[part].to(pipe.runs_on, original.weight.dtype)
                embeddings.append(WordEmbedding(original, vectors, len(self.tokenizers[name])))
                undo.callback(model.set_input_embeddings, original)
                model.set_input_embeddings(embeddings[-1])
                _find_end(model, self.tokenizers[name].eos_token_id, undo)
            yield embeddings


class WordEmbedding(nn.Module):
    """Stands in for the token embedding of a text encoder, and keeps it as its child.

    Args:
        layer: The embedding as found.
        vectors: Of the tokens that it does not know. Shape: [layers, tokens, width].
        tokens: Size of the vocabulary; the new tokens come last.

    Attributes:
        read_layer: The layer whose vectors are being read.
        met: Whether any of them has been read.
    """

    vectors: Tensor

    def __init__(self, layer: nn.Module, vectors: Tensor, tokens: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("vectors", vectors, persistent=False)
        self.read_layer = 0
        self.met = False
        self._first = tokens - vectors.shape[1]

    @property
    def weight(self) -> Tensor:
        """The embedding as found, for code that looks at it."""
        return self.layer.get_parameter("weight")

    def forward(self, ids: Tensor) -> Tensor:
        """Shape: [rows, tokens] -> [rows, tokens, width]."""
        is_added = ids >= self._first
        self.met = self.met or bool(is_added.any())
        known = self.layer(ids.masked_fill(is_added, 0))
        added = self.vectors[self.read_layer][(ids - self._first).clamp(min=0)]
        return torch.where(is_added[..., None], added.to(known.dtype), known)


@dataclass(frozen=True)
class ExpandingTokenizer:
    """A tokenizer that reads a word of several vectors as so many tokens.

    Attributes:
        tokenizer: The tokenizer, which has a token for every vector.
        expand: Writes every word as all its tokens.
        length: How many tokens the model reads; None means as many as the tokenizer says.
    """

    tokenizer: Any
    expand: Callable[[str, Any], str]
    length: int | None = None
    _read: dict[tuple, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model_max_length(self) -> int:
        """How many tokens the model reads."""
        return self.tokenizer.model_max_length if self.length is None else self.length

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenises, each text once: to find a concept's words takes many parts of few prompts."""
        key = text, *sorted(options.items())
        if key not in self._read:
            self._read[key] = self.tokenizer(self.expand(text, self.tokenizer), **options)
        return self._read[key]


def _brought(concepts: Sequence[LoadedConcept], part: Part) -> dict[str, Tensor]:
    """The words for a text encoder and their vectors, [tokens, layers, width]."""
    words: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for loaded in concepts:
        for word, by_part in loaded.factors.embeddings.items():
            vectors = by_part.get(part)
            if vectors is None:
                continue
            if word in words and not torch.equal(words[word], vectors):
                raise ValueError(
                    f"the files of concepts {owner[word]!r} and {loaded.concept.name!r} both bring the word {word!r}, "
                    "with different vectors; rename it in one of the files"
                )
            words[word], owner[word] = vectors, loaded.concept.name
    return words


def _with_words(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """A copy of a tokenizer with so many tokens for each word."""
    copied, known, tokens = copy.deepcopy(tokenizer), tokenizer.get_vocab().keys(), {}
    for word, number in words.items():
        # Whole words, as `find_words` has them.
        alone = bool(re.match(r"\w", word) and re.search(r"\w$", word))
        for name in [word, *(_further(word, i) for i in range(1, number))]:
            if name in known or name in tokens:
                raise ValueError(
                    f"the tokenizer knows {word!r} already, so a LoRA file cannot add it; if it comes from a "
                    f"textual inversion, call `unload_textual_inversion({word!r})`"
                )
            tokens[name] = AddedToken(name, single_word=alone)
    copied.add_tokens(list(tokens.values()))  # all at once: each time, it counts the tokens that it has
    if len(copied) != len(tokenizer) + len(tokens):
        raise ValueError(f"the tokenizer does not take all words of the LoRA files: {', '.join([*words][:3])}, ...")
    return copied


def _further(word: str, i: int) -> str:
    """The name of a word's further token; diffusers, which would find it in other words too, has other names."""
    return f"{word}#{i}"


def _find_end(model: nn.Module, end: int, undo: Journal) -> None:
    """Makes a CLIP text model take its pooled text from the end token, even if a word has a higher token id.

    With an `eos_token_id` of 2, as in SDXL's configurations, transformers takes the highest token id instead.
    """
    for module in model.modules():
        if getattr(module, "eos_token_id", None) == 2:
            undo.callback(setattr, module, "eos_token_id", 2)
            module.eos_token_id = end  # pyright: ignore[reportArgumentType]


def _side_by_side(texts: Sequence[EncodedText]) -> EncodedText:
    first = texts[0]
    if len(texts) == 1:
        return first
    negative = [text.negative_prompt_embeds for text in texts if text.negative_prompt_embeds is not None]
    return replace(
        first,
        prompt_embeds=torch.cat([text.prompt_embeds for text in texts], dim=-1),
        negative_prompt_embeds=torch.cat(negative, dim=-1) if negative else None,
    )
