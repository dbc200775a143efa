"""One key of a LoRA file: which part of the pipeline it changes, which layer it names, and what its tensor is."""

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = ("unet", "transformer", "text_encoder", "text_encoder_2")

# Prefixes of the layer names of each part. Order matters: the first match counts.
_PREFIXES: tuple[tuple[str, Part], ...] = (
    (r"lora_te2_", "text_encoder_2"),
    (r"lora_te1?_", "text_encoder"),
    (r"lora_unet_|lycoris_", "unet"),
    (r"lora_transformer_", "transformer"),
    (r"(?:base_model\.model\.)?text_encoder_2\.", "text_encoder_2"),
    (r"(?:base_model\.model\.)?text_encoder\.", "text_encoder"),
    (r"(?:base_model\.model\.)?unet\.", "unet"),
    (r"(?:base_model\.model\.)?transformer\.", "transformer"),
    (r"(?:base_model\.model\.)?(?:model\.)?diffusion_model\.", "unet"),
    (r"text_encoders\.clip_g\.transformer\.", "text_encoder_2"),
    (r"text_encoders\.clip_l\.transformer\.", "text_encoder"),
    (r"(?:base_model\.model\.)?(?=text_model\.|encoder\.layers\.)", "text_encoder"),
    (r"base_model\.model\.|", "unet"),
)

# Suffixes after the layer's name and a dot. If a pattern has a group, that is the slot. Repetitions are possessive and
# few, so that no crafted key is slow to match.
_SIDES = {"A": "down", "B": "up"}
_SLOTS: tuple[tuple[str, str | None], ...] = (
    (r"lora_(down|up|mid)\.weight", None),
    (r"lora\.(down|up)\.weight", None),  # "to_q_lora.down.weight" in attention processors and ED-LoRA
    (r"lora_(?:linear_)?layer\.(down|up)\.weight", None),
    (r"lora_([AB])(?:\.\w++)?\.weight", None),  # with the adapter's name inside
    (r"lora_(?:[AB](?:\.\w++)?|down|up)\.bias", "bias"),
    (r"diff_b", "bias"),
    (r"[wb]_norm", "norm"),
    (r"(alpha|diff|scalar)", None),
    (r"dora_scale|lora_magnitude_vector(?:\.\w++){0,3}+", "magnitude"),
    (r"(hada_w[12]_[ab]|hada_t[12])", None),
    (r"(lokr_w[12](?:_[ab])?|lokr_t[12])", None),
    (r"oft_(?:blocks|diag)|oft_R\.(?:\w++\.)?weight|rescale", "oft"),
    (r"[ab][12]\.weight|bm\.weight", "glora"),
    (r"on_input", "ia3"),
    (r"(?:vera|randlora|boft|hra|shira|bone|vblora)_\w++(?:\.\w++){0,3}+", "other"),
)
_AFTER_UNDERSCORE = 1  # the one that may follow an underscore instead
_KEY = re.compile(
    "[._](?:"
    + "|".join(
        f"(?P<s{i}>{'' if i == _AFTER_UNDERSCORE else r'(?<=[.])'}(?:{pattern})$)"
        for i, (pattern, _) in enumerate(_SLOTS)
    )
    + ")"
)
_PREFIX = re.compile("|".join(f"(?P<p{i}>^(?:{pattern}))" for i, (pattern, _) in enumerate(_PREFIXES)))
_EMBEDDING = re.compile(r"new_concept_embedding\.(.+)|bundle_emb\.(.+?)(?:\.(string_to_param\.\*|clip_[lg]))?")


@dataclass(frozen=True)
class Key:
    """One key of a file, taken apart.

    Attributes:
        part: The component of the pipeline whose layer is changed.
        module: The layer as the file spells it, with underscores for dots, without prefix.
        slot: What the tensor is: "down", "up", "mid", "alpha", "hada_w1_a", "lokr_w2", "diff", "magnitude", ...
        prefix: What stood before the layer's name.
        suffix: What stood after it.
    """

    part: Part
    module: str
    slot: str
    prefix: str
    suffix: str


def parse(key: str) -> Key | None:
    """Takes a key apart; None if it is not a key of an adapter."""
    found = _KEY.search(key)
    if found is None or found.lastgroup is None or found.lastindex is None:
        return None
    # The last group to close is the named one; the slot, if it has one, is the group inside.
    slot = _SLOTS[int(found.lastgroup[1:])][1] or found[found.lastindex + 1]
    rest = key[: found.start()]
    start = _PREFIX.match(rest)
    if start is None or start.lastgroup is None:
        return None
    part = _PREFIXES[int(start.lastgroup[1:])][1]
    module = rest[start.end() :]
    if not module:
        return None
    return Key(part, module.replace(".", "_"), _SIDES.get(slot, slot), start[0], found[0])


def bundled_embedding(key: str) -> tuple[str, Part] | None:
    """The word whose embedding a key holds, and the text encoder that reads it; None for other keys.

    Mix-of-Show calls them `new_concept_embedding`, and trainers bundle textual inversions as `bundle_emb`.
    """
    found = _EMBEDDING.fullmatch(key)
    if found is None or key.endswith(("clip_l_out", "clip_g_out")):  # vectors that replace the encoder's output
        return None
    return found[1] or found[2], "text_encoder_2" if found[3] == "clip_g" else "text_encoder"
