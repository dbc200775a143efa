"""The scale of a file's factors: alpha / rank, from the file's keys, from PEFT's settings, or as given."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import PARTS, Part
from lora_compose.pipelines.formats.kinds import rank_of, readable
from lora_compose.pipelines.formats.layers import Layer
from lora_compose.pipelines.formats.models import MODEL_PARTS

MAX_SCALE = 1000.0
"""The largest alpha / rank that is accepted; trainers write at most a few tens."""

# PEFT reads patterns as regular expressions that match a layer's name, or its end after a dot. A regular expression
# from an unknown file is never run: trainers write names, or ends of names, with dots escaped or not.
_NAME = re.compile(r"(?P<whole>\^)?(?P<inside>\.\*\\\.)?(?P<name>[\w-]+(?:\\?\.[\w-]+)*)\$?")
_OUTER = "text_model."  # around the layers of CLIP until transformers 5, and so in patterns
_TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga", "loftq")  # how PEFT calls starts that change the model's weights
_SHOWN = 80
_CONFIGURED = "lora_adapter_metadata or adapter_config.json"


class Alphas:
    """The alphas of one file.

    Args:
        given: Alpha for a file without one; None if the caller gave none.

    Raises:
        LoraError: If a pattern in PEFT's configuration is a regular expression, or the factors began as a part of the
            model's weights, which was taken out of these for training.
    """

    def __init__(self, file: LoraFile, given: float | None = None) -> None:
        self._name = file.path.name
        self._given = given
        everywhere = file.config.get("", {})
        self._config: dict[Part, Mapping[str, Any]] = {
            part: {**everywhere, **file.config.get(part, {})} for part in PARTS
        }
        starts = (str(config.get("init_lora_weights")) for config in self._config.values())
        if taken := next((start for start in starts if start.lower().startswith(_TAKEN_OUT)), None):
            raise LoraError(
                f"{self._name} is a LoRA that began as a part of the model's weights (init_lora_weights is "
                f"{taken[:_SHOWN]!r}), which training took out of them; here they have it still. Save it as an "
                "ordinary LoRA: PEFT's save_pretrained does, with path_initial_model_for_weight_conversion"
            )
        try:
            self._patterns = {part: _patterns(config.get("alpha_pattern")) for part, config in self._config.items()}
        except ValueError as error:
            raise LoraError(f"{self._name}: {_CONFIGURED}: {error}") from error

    def own(self, name: str, layer: Layer) -> float | None:
        """The alpha of a layer in a key or PEFT's configuration, if it has an effect. LoraError if not positive."""
        kind = readable(layer.shapes)
        if kind is not None and kind.transform is not None and not kind.scaled:
            return None  # it bounds a rotation, and 0 means no bound
        if rank_of(layer.shapes) is None and "r" not in self._config[layer.part]:
            return None
        try:
            if "alpha" in layer.slots:
                return _positive(layer.slots["alpha"])
            return self._configured(name, layer.part)
        except (TypeError, ValueError, OverflowError) as error:
            where = "a key" if "alpha" in layer.slots else _CONFIGURED
            raise LoraError(f"{self._name}: {where} gives {layer.part}.{name} no usable alpha: {error}") from error

    def settings(self, layer: Layer) -> Mapping[str, Any]:
        """PEFT's settings of a layer, the alpha of its key, the flags of kinds, and whether PEFT wrote it."""
        own: dict[str, Any] = {"alpha": float(layer.slots["alpha"])} if "alpha" in layer.slots else {}
        flags = {slot: slot in layer.slots and bool(layer.slots[slot]) for slot in kinds.flags()}
        return {**self._config[layer.part], **own, **flags, "peft": self.of_peft(layer)}

    def of_peft(self, layer: Layer) -> bool:
        """Whether PEFT wrote a layer: it has settings of PEFT, or PEFT's prefix."""
        return bool(self._config[layer.part]) or layer.keys[0].startswith("base_model.model.")

    def scale(self, name: str, layer: Layer) -> float:
        """The scale of a layer, alpha / rank. Alpha is the file's, otherwise the given one, otherwise the rank.

        Raises:
            ValueError: If alpha is unusable, the caller gave one although the file has its own, or the scale is above
                `MAX_SCALE`.
        """
        scalar = float(layer.slots["scalar"]) if "scalar" in layer.slots else 1.0
        scale = scalar * self._over_rank(name, layer)
        if not abs(scale) <= MAX_SCALE:
            raise ValueError(
                f"its change would be multiplied by {scale:.3g} (alpha / rank); expected at most {MAX_SCALE:g}, since "
                "trainers write at most a few tens: the file looks damaged"
            )
        return scale

    def _over_rank(self, name: str, layer: Layer) -> float:
        own, config, rank = self.own(name, layer), self._config[layer.part], rank_of(layer.shapes)
        if rank is None:  # a whole weight: alpha counts only where PEFT gives the rank as well
            return own / _positive(config["r"]) if own is not None and "r" in config else 1.0
        if own is not None and self._given is not None:
            raise ValueError("the file has its own alpha; leave alpha out")
        rescaled = config.get("use_rslora") and "alpha" not in layer.slots
        return (own or self._given or rank) / (rank**0.5 if rescaled else rank)

    def _configured(self, name: str, part: Part) -> float | None:
        """PEFT's alpha of a layer; None where there is none. LoHa and LoKr call it "alpha"."""
        patterns, config = self._patterns[part], self._config[part]
        bare = name.removeprefix(_OUTER)
        names = [name] if part in MODEL_PARTS else [bare, f"{_OUTER}{bare}"]
        matching = [patterns[spelled] for known in names for spelled in _spellings(known) if spelled in patterns]
        if matching:
            return _positive(min(matching)[1])  # of several that match, the first one counts
        return next((_positive(config[key]) for key in ("lora_alpha", "alpha") if key in config), None)


def _patterns(given: Any) -> dict[str, tuple[int, Any]]:
    """Position and alpha of every pattern: "^name" for a whole name, "name" for it or an end, ".name" for an end."""
    patterns: dict[str, tuple[int, Any]] = {}
    if not isinstance(given or {}, Mapping):
        raise ValueError(f"alpha_pattern is a {type(given).__name__}; expected alphas by name")
    for position, (pattern, alpha) in enumerate((given or {}).items()):
        plain = _NAME.fullmatch(pattern)
        if plain is None:
            raise ValueError(
                f"the pattern {pattern[:_SHOWN]!r} in alpha_pattern is a regular expression; expected the name of a "
                "layer or its end, such as 'attn2.to_q'"
            )
        prefix = "." if plain["inside"] else "^" if plain["whole"] else ""
        patterns.setdefault(prefix + plain["name"].replace("\\.", "."), (position, alpha))
    return patterns


def _spellings(name: str) -> Iterator[str]:
    """Keys of `_patterns` that match a layer."""
    pieces = name.split(".")
    yield f"^{name}"
    yield name
    for i in range(1, len(pieces)):
        end = ".".join(pieces[i:])
        yield from (end, f".{end}")


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"alpha is {number}; expected a positive number")
    return number


def needed_alpha(alpha: float | None, file: LoraFile) -> float | None:
    """The alpha that was given, for files that do not say theirs."""
    settings = (key for config in file.config.values() for key in config)
    own = any(key.endswith(".alpha") for key in file.tensors) or not {"lora_alpha", "alpha"}.isdisjoint(settings)
    return None if own else alpha
