"""Tags in prompts that name LoRAs as other programs do, `<lora:cat:0.8>`."""

import re
from collections.abc import Collection, Iterable

from lora_compose.pipelines.support.spelling import did_you_mean, shortened

_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)

_MOST = 200  # concepts that a message lists


def has_tags(text: str) -> bool:
    """Whether a text names LoRAs as other programs do, `<lora:cat:0.8>`."""
    return "<lora:" in text.lower()


def check_no_tags(texts: Iterable[str]) -> None:
    """Raises ValueError for tags where none is read: in negative prompts, and in those of concepts."""
    if wrong := next(filter(has_tags, texts), None):
        raise ValueError(f"tags such as <lora:cat:0.8> are read in prompt alone; take them out of {shortened(wrong)}")


def take_tags(prompt: str, known: Collection[str]) -> tuple[str, dict[str, float]]:
    """A prompt such as "a cat <lora:cat:0.8>" without its tags, and their weights by name, as `read_tags`.

    Raises ValueError for tags of unknown names too.
    """
    plain, weights = read_tags(prompt)
    for name in weights:
        if name not in known:
            loaded = ", ".join(sorted(known)[:_MOST]) or "none"
            raise ValueError(
                f"the prompt has a tag for {name!r}, but there is no concept {name!r}; there are {loaded}. Load it "
                f"with load_concept or add_concepts, on the command line with --loras FOLDER{did_you_mean(name, known)}"
            )
    return plain, weights


def read_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """A prompt without its tags of LoRAs, as other programs have them, and their weights by name.

    Raises:
        ValueError: For tags that are not closed, weights that are no numbers, and names given twice.
    """
    weights: dict[str, float] = {}
    if has_tags(_TAG.sub("", prompt)):
        raise ValueError("the prompt has '<lora:' without '>'; write a tag as <lora:NAME:0.8>")
    for tag in _TAG.finditer(prompt):
        name, _, number = tag[1].strip().partition(":")
        name = name.strip()
        try:
            weight = float(number or 1)
        except ValueError:
            raise ValueError(f"{tag[0]!r}: expected a name and one number, such as <lora:{name}:0.8>") from None
        if name in weights:
            raise ValueError(f"the prompt has a tag for {name!r} twice; leave out one")
        weights[name] = weight
    if not weights:
        return prompt, {}
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", _TAG.sub(" ", prompt))).strip(" ,"), weights
