"""Tokenizers of pipelines that put the prompt into a chat template; the model may read only a part of the result.

Language models read a prompt as the message of a user: `<|im_start|>user ... <|im_end|>`. The template's tokens move
all words of the prompt, so words are found in the text that the pipeline tokenises, by the characters of each token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MARK = "\ufffc"
"""A character that no template has."""


@dataclass(frozen=True)
class TemplateTokenizer:
    """A tokenizer with a pipeline's chat template.

    Attributes:
        tokenizer: A fast tokenizer, which knows the characters of each token.
        render: Writes a prompt into the template.
        length: Number of tokens to which the pipeline cuts or pads the text.
        model_max_length: Number of tokens that the model reads.
        dropped: Number of tokens at the start that it does not read.
        adds_special: Whether the tokenizer adds its own special tokens to those of the template.
        pads: Whether the tokenizer pads the text, on its own side; otherwise it begins at the first token.
    """

    tokenizer: Any
    render: Callable[[str], str]
    length: int
    model_max_length: int
    dropped: int = 0
    adds_special: bool = True
    pads: bool = True

    def real_tokens(self, prompts: Sequence[str]) -> Tensor:
        """True at the tokens of prompts in the template that are not padding. Shape: [prompts, length]."""
        tokens = self.tokenizer(
            list(map(self.render, prompts)), padding="max_length", max_length=self.length, truncation=True,
            return_tensors="pt", add_special_tokens=self.adds_special,
        )  # fmt: skip
        return tokens.attention_mask.bool()

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenises a text alone, without the template."""
        return self.tokenizer(text, **options)

    def positions(self, prompt: str, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens of a span of the prompt; tokens of the template count.

        Args:
            start: The first character.
            end: The one after the last.

        Raises:
            ValueError: If the template does not keep the prompt, the text is cut off before the end of the span, or
                the tokenizer does not know the characters of its tokens.
        """
        text, before = self.render(prompt), self.render(_MARK).partition(_MARK)[0]
        words = prompt[start:end]
        if not text.startswith(before + prompt):
            raise ValueError(
                f"{words!r} is lost in this model's chat template, which does not keep the prompt {prompt!r} as it is; "
                "remove template markup from it, or give prompt_embeds with token_positions"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            class_name = type(self.tokenizer).__name__
            raise ValueError(f"a {class_name} does not give the characters of its tokens; expected a fast tokenizer")

        def of(**cut: Any) -> tuple[int, ...]:
            options = {"add_special_tokens": self.adds_special, "return_offsets_mapping": True, "verbose": False, **cut}
            spans = self.tokenizer(text, **options)["offset_mapping"]
            first, last = start + len(before), end + len(before)
            return tuple(i for i, (a, b) in enumerate(spans) if a < last and b > first)

        padding = "max_length" if self.pads else False
        read, whole = of(padding=padding, truncation=True, max_length=self.length), of(truncation=False)
        if len(read) < len(whole) or read[0] < self.dropped:
            limit = self.length - self.dropped
            raise ValueError(
                f"{words!r} stands at tokens {whole[0] + 1} to {whole[-1] + 1} of the prompt in its chat template, but "
                f"the model reads only {limit} after the first {self.dropped}; move it forward, shorten the prompt "
                f"{prompt!r}, or raise max_sequence_length"
            )
        return tuple(position - self.dropped for position in read)
