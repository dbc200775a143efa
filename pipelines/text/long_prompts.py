"""Prompts that are longer than a text encoder reads at once, in chunks; and weights in prompts.

A chunk ends with a word, after punctuation where there is some. Each is encoded alone and the results stand one after
the other, as in most tools. Of the texts of one image, shorter ones get empty chunks. Beside a longer prompt, the
chunks of an image are repeated: attention to a text written twice is attention to the text, and UNets with concepts
leave out what is repeated.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.text.emphasis import Weighted, read_emphasis

_LATEST = 0.5
"""A chunk ends after punctuation if that leaves more than this part of it."""

Span = tuple[int, int]
"""First character, and the character after the last."""

Texts = Sequence[str] | None


@dataclass(frozen=True)
class LongTokenizer:
    """A tokenizer of one chunk whose model reads so many chunks in this call."""

    tokenizer: Any
    chunks: int

    @property
    def model_max_length(self) -> int:
        """Tokens of all chunks, special ones too."""
        return self.chunks * self.tokenizer.model_max_length

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenises a text as a whole."""
        return self.tokenizer(text, **options)

    def parts(self, text: str, start: int, end: int) -> list[tuple[str, Span, int]]:
        """The parts of a span: the chunk that each is in, where it is in that, and the tokens of the chunks before."""
        length = self.tokenizer.model_max_length
        return [
            (text[a:b], (max(start - a, 0), min(end, b) - a), i * length)
            for i, (a, b) in enumerate(chunks_of(self.tokenizer, text))
            if start < b and end > a
        ]


def chunks_of(tokenizer: Any, text: str) -> list[Span]:
    """Spans of characters that a model reads at once, at least one. ValueError for a word that alone is too long."""
    limit = tokenizer.model_max_length - 2

    def tokens(start: int, end: int) -> int:
        if len(text[start:end].split()) > limit:  # each has a token at least
            return limit + 1
        return len(tokenizer(text[start:end], add_special_tokens=False, truncation=False, verbose=False).input_ids)

    chunks: list[Span] = []
    start = len(text) - len(text.lstrip())
    while tokens(start, len(text)) > limit:
        ends = [start + word.end() for word in re.finditer(r"\S+", text[start:])]
        low, high = 0, len(ends)  # so many words fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tokens(start, ends[middle - 1]) <= limit else (low, middle)
        if low == 0:
            word = text[start : ends[0]]
            raise ValueError(f"the word {shortened(word)} has more tokens than the model reads at once, {limit}")
        pauses = [i + 1 for i in range(low) if text[ends[i] - 1] in ".,;:!?" and i + 1 > _LATEST * low]
        end = ends[(pauses[-1] if pauses else low) - 1]
        chunks.append((start, end))
        start = end + len(text[end:]) - len(text[end:].lstrip())
    return [*chunks, (start, len(text))]


@dataclass(frozen=True)
class Reading:
    """How the texts of a call are read.

    Attributes:
        tokenizers: Tokenizers of one chunk, one for each text encoder.
        chunks: How many chunks the texts of each prompt have; those of shorter ones are repeated.
    """

    tokenizers: Sequence[Any]
    chunks: Sequence[int]

    @classmethod
    def of(
        cls,
        tokenizers: Sequence[Any],
        prompts: Sequence[Sequence[str]],
        negative: Sequence[Sequence[str]],
        others: Sequence[str] = (),
        *,
        in_chunks: bool = True,
    ) -> "Reading | None":
        """How these texts are read; None if each is one chunk without weights.

        Args:
            tokenizers: One for each text encoder.
            prompts: The prompts, for each of them.
            negative: Negative prompts, each for one prompt, or one for all.
            others: Texts of concepts.
            in_chunks: Whether a text may have several chunks; otherwise it is cut off.
        """
        columns = (*prompts, *negative, others)
        read = [[read_emphasis(text) for text in texts] for texts in columns]
        plain = {entry.text for texts in read for entry in texts}
        length = {text: max(len(chunks_of(t, text)) if in_chunks else 1 for t in tokenizers) for text in plain}

        def chunks(prompt: int) -> int:
            emphases = [texts[min(prompt, len(texts) - 1)] for texts in read[:-1] if texts]
            return max(length[entry.text] for entry in (*emphases, *read[-1]))

        chunk_counts = tuple(chunks(prompt) for prompt in range(len(prompts[0])))
        if set(chunk_counts) == {1} and plain == {text for texts in columns for text in texts}:
            return None
        return cls(tokenizers, chunk_counts)

    @property
    def longest(self) -> int:
        """How many chunks every text gets."""
        return max(self.chunks)

    def lengths(self, images_per_prompt: int) -> Mapping[str, Tensor]:
        """Tokens of the rows without those that are repeated, if rows differ; as a further input of the model.

        Args:
            images_per_prompt: Rows of each prompt.
        """
        if len(set(self.chunks)) == 1:
            return {}
        tokens = torch.tensor(self.chunks) * self.tokenizers[0].model_max_length
        return {"lengths": tokens.repeat_interleave(images_per_prompt)}

    def encode(
        self,
        columns: Sequence[Texts],
        encode: Callable[[Sequence[Texts]], Sequence[Tensor]],
        weighted: Callable[[Sequence[Weighted]], Tensor],
        images_per_prompt: int,
    ) -> list[Tensor]:
        """Encodes texts chunk by chunk.

        Args:
            columns: The prompts for each text encoder, then the negative prompts for each; None is none.
            encode: Encodes one chunk of all of them: the prompts, the negative prompts, and what is pooled of each.
            weighted: Encodes one chunk of one text, as each text encoder reads it. Shape: [1, tokens, channels].
            images_per_prompt: Rows of each prompt.

        Returns:
            What `encode` gives, with the tokens of all chunks. What is pooled is of the first.
        """
        split = [
            None if column is None else [self._split(text, i) for i, text in enumerate(column)] for column in columns
        ]
        parts = [
            encode([None if texts is None else [text[chunk].text for text in texts] for texts in split])
            for chunk in range(self.longest)
        ]
        half = len(columns) // 2
        joined: list[Any] = [None, None]
        for side, texts in ((0, split[:half]), (1, split[half:])):
            if parts[0][side] is None:
                continue
            chunks = [part[side].clone() for part in parts]
            read = [column or texts[0] for column in texts]
            for row in range(len(read[0] or ())):
                for i in range(self.longest):
                    pieces = [column[row][i] for column in read if column is not None]
                    if not all(piece.is_even for piece in pieces):
                        rows = slice(row * images_per_prompt, (row + 1) * images_per_prompt)
                        chunks[i][rows] = weighted(pieces).to(chunks[i])
            joined[side] = torch.cat(chunks, dim=1)
        return [*joined, *parts[0][2:]]

    def _split(self, text: str, prompt: int) -> list[Weighted]:
        whole = read_emphasis(text)
        spans, chunks = chunks_of(self.tokenizers[0], whole.text), self.chunks[prompt]
        if len(spans) > chunks:
            raise ValueError(
                f"{shortened(whole.text)} is longer than the prompt of its image, which has {chunks} chunks of "
                f"{self.tokenizers[0].model_max_length} tokens; shorten it, or lengthen the prompt"
            )
        parts = [*(whole[slice(*span)] for span in spans), *[Weighted("", ())] * (chunks - len(spans))]
        return [parts[i % chunks] for i in range(self.longest)]
