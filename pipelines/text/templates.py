"""Tokenizers of pipelines that write a prompt into a chat template, of which the model may not read everything.

Language models read a prompt as the message of a user: `<|im_start|>user ... <|im_end|>`. The template's tokens move
all words of the prompt, so words are found in the text that the pipeline tokenises, by the characters of each token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "\ufffc"
"""A character that no template has."""


@dataclass(frozen=True)
class TemplateTokenizer:
    """A tokenizer as a pipeline uses it.

    Attributes:
        tokenizer: A fast tokenizer, which knows the characters of each token.
        render: Writes a prompt into the template.
        length: Tokens to which the pipeline cuts or pads the text.
        model_max_length: Tokens of the text that the model reads.
        dropped: How many tokens at the start it does not read.
    """

    tokenizer: Any
    render: Callable[[str], str]
    length: int
    model_max_length: int
    dropped: int = 0

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenises a text alone, without the template."""
        return self.tokenizer(text, **options)

    def positions(self, prompt: str, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that have characters of a span of a prompt, the template's counted.

        Args:
            prompt: The prompt.
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
                "leave out what means something to templates, or give prompt_embeds with token_positions"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            kind = type(self.tokenizer).__name__
            raise ValueError(f"a {kind} does not tell which characters its tokens have; expected a fast tokenizer")

        def of(**cut: Any) -> tuple[int, ...]:
            spans = self.tokenizer(text, return_offsets_mapping=True, verbose=False, **cut)["offset_mapping"]
            first, last = start + len(before), end + len(before)
            return tuple(i for i, (a, b) in enumerate(spans) if a < last and b > first)

        read, whole = of(padding="max_length", truncation=True, max_length=self.length), of(truncation=False)
        if len(read) < len(whole) or read[0] < self.dropped:
            limit = self.length - self.dropped
            raise ValueError(
                f"{words!r} stands at tokens {whole[0] + 1} to {whole[-1] + 1} of the prompt in its chat template, but "
                f"the model reads only {limit} after the first {self.dropped}; move it forward, shorten the prompt "
                f"{prompt!r}, or raise max_sequence_length"
            )
        return tuple(position - self.dropped for position in read)
