"""One key of a LoRA file: the part of the pipeline that it changes, the layer that it names, and what its tensor is.

The layer is still as the file spells it; `concepts/loading.py` finds that of the model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from lora_compose.pipelines.formats import kinds

Part = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_conditioner"]
PARTS: tuple[Part, ...] = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_conditioner")

# Prefixes of the layer names of each part. Order matters: the first match counts.
_PREFIXES: tuple[tuple[str, Part], ...] = (
    (r"lora_te[23]_", "text_encoder_2"),  # kohya's third is T5, which is the second of FLUX.1
    (r"lora_te1?_", "text_encoder"),
    (r"(?:lora_unet_|lycoris_)llm_adapter_", "text_conditioner"),
    (r"lora_unet_|oft_unet_|lycoris_", "unet"),
    (r"lora_transformer_", "transformer"),
    (r"text_encoder\.qwen3\.", "text_encoder"),
    (r"(?:base_model\.model\.)?text_encoder_2\.", "text_encoder_2"),
    (r"(?:base_model\.model\.)?text_encoder\.", "text_encoder"),
    (r"(?:base_model\.model\.)?unet\.", "unet"),
    (r"(?:base_model\.model\.)?(?:conditional_)?transformer\.", "transformer"),
    (r"(?:base_model\.model\.)?text_conditioner\.", "text_conditioner"),
    (r"(?:base_model\.model\.)?(?:model\.)?diffusion_model\.llm_adapter\.", "text_conditioner"),
    (r"(?:base_model\.model\.)?(?:model\.)?diffusion_model\.", "unet"),
    (r"text_encoders\.(?:clip_g|t5xxl)\.transformer\.", "text_encoder_2"),
    (r"text_encoders\.(?:clip_l|qwen\w+)\.transformer\.", "text_encoder"),
    (r"(?:clip_g|t5)\.", "text_encoder_2"),  # of the Open Model Initiative, as OneTrainer may write
    (r"clip_l\.", "text_encoder"),
    (r"net\.llm_adapter\.", "text_conditioner"),  # Anima's checkpoint has its models in a `net`
    (r"net\.", "unet"),
    (r"(?:base_model\.model\.)?(?=text_model\.|encoder\.layers\.)", "text_encoder"),
    (r"base_model\.model\.|", "unet"),
)

_PREFIX = re.compile("|".join(f"(?P<p{i}>^(?:{pattern}))" for i, (pattern, _) in enumerate(_PREFIXES)))
_KEPT = 2**14  # keys of the last files, which are taken apart at each stage of reading them
_EMBEDDING = re.compile(r"new_concept_embedding\.(.+)|bundle_emb\.(.+?)(?:\.(string_to_param\.\*|clip_[lg]))?")


@dataclass(frozen=True)
class Key:
    """One key of a file, taken apart.

    Attributes:
        part: The component as the file's prefix says; "unet" is the denoiser of any model (`concepts.loading.assign`).
        module: The layer as the file spells it, with underscores for dots, without prefix.
        slot: What the tensor is, as its kind calls it: "down", "up", ...; or one of `kinds.numbers()`.
        kind: The kind of LoRA that has such tensors; None for the numbers that scale any.
        prefix: What stood before the layer's name.
        suffix: What stood after it.
    """

    part: Part
    module: str
    slot: str
    kind: kinds.Kind | None
    prefix: str
    suffix: str


def parse(key: str) -> Key | None:
    """Takes a key apart; None if it is not a key of an adapter."""
    return _parse(key, kinds.KINDS)


@lru_cache(_KEPT)
def _parse(key: str, known: tuple[kinds.Kind, ...]) -> Key | None:
    pattern, slots = _endings(known)
    end = pattern.search(key)
    if end is None or end.lastgroup is None:
        return None
    rest = key[: end.start()]
    start = _PREFIX.match(rest)
    if start is None or start.lastgroup is None or start.end() == len(rest):
        return None
    slot, kind = slots[int(end.lastgroup[1:])]
    part = _PREFIXES[int(start.lastgroup[1:])][1]
    return Key(part, rest[start.end() :].replace(".", "_"), slot, kind, start[0], end[0])


@cache
def _endings(known: tuple[kinds.Kind, ...]) -> tuple[re.Pattern[str], Sequence[tuple[str, kinds.Kind | None]]]:
    """One pattern for the ends of all keys, and the slot and kind of each of its groups."""
    named = [((slot, kind), end) for kind in known for slot, end in kind.endings.items()]
    named += [((slot, None), end) for slot, end in kinds.numbers().items()]
    ends = "|".join(f"(?:{end})$(?P<s{i}>)" for i, (_, end) in enumerate(named))
    return re.compile(f"(?=[._])(?:{ends})"), [slot for slot, _ in named]


def bundled_embedding(key: str) -> tuple[str, Part] | None:
    """The word whose embedding a key holds, and the text encoder that reads it; None for other keys.

    Mix-of-Show calls them `new_concept_embedding`, and trainers bundle textual inversions as `bundle_emb`.
    """
    match = _EMBEDDING.fullmatch(key)
    if match is None or key.endswith(("clip_l_out", "clip_g_out")):  # vectors that replace the encoder's output
        return None
    return match[1] or match[2], "text_encoder_2" if match[3] == "clip_g" else "text_encoder"
