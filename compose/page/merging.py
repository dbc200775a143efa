"""Several LoRAs of a session merged into one, which becomes an upload of the session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, merge_files
from lora_compose.compose.page.store import ShownLora, Store
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.merging import make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from lora_compose.pipelines.merging.changes import check_number


@dataclass(frozen=True)
class Merged:
    """A LoRA merged from others; `kept` is the share of each that is in it, above 1 where others add to it."""

    lora: ShownLora
    kept: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]


def read_chosen(chosen: Sequence[tuple[ShownLora, float]], method: str) -> list[Given]:
    """Reads LoRAs with weights, of which there are enough for a method. ValueError if they cannot be merged by it."""
    check_number(make_merger(method), method, len(chosen))
    if not any(weight for _, weight in chosen):
        raise ValueError("every weight is 0; there is nothing to merge")
    return [Given(lora.shown, read_lora(find_file(lora_source(lora.source))), weight) for lora, weight in chosen]


def merge_loras(store: Store, pipe: Any, given: Sequence[Given], first: ShownLora, method: str) -> Merged:
    """Merges LoRAs into an upload with the words of the first. ValueError if they cannot be; nothing is kept then.

    Methods that look at the inputs of the model make an image with each LoRA.
    """
    merger = make_merger(method)
    matched = match_files(given, pipe)
    moments = None
    if merger.needs_model:
        moments = calibrate(pipe, matched.changes, [prompt_of(entry.file, entry.source) for entry in given], merger)
    name = "+".join(Path(entry.source).stem for entry in given)[:80]
    path = store.new_path()
    report = merge_files(matched, merger, path, moments=moments, method=method)
    words = {"trigger": first.trigger, "class_word": first.class_word}
    lora = store.keep(path, f"{name}-{method}.safetensors", **words)
    kept = zip([entry.source for entry in given], report.blocks[-1].kept, strict=True)
    return Merged(lora, tuple((shown, share) for shown, share in kept if share is not None), report.notes)
