"""Facts on which an image depends, to be compared and hashed: its run, and the contents of all files."""

import hashlib
import json
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.concepts.finding import find_file, local_path
from lora_compose.pipelines.concepts.lru import file_key
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.mask_images import URI_PREFIX
from lora_compose.pipelines.scene.scene import Run
from lora_compose.pipelines.scene.sources import weighted
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.quantising import QUANTISED
from lora_compose.pipelines.support.regular import sha256_of

_MODEL_FILES = (".safetensors", ".json", ".txt", ".model")


def run_facts(run: Run, seeds: Sequence[int], threads: int | None, savers: Sequence[str]) -> list[Any]:
    """Everything that images depend on except model, seed, paths and device. ValueError if a file is missing.

    `threads` are those of torch on the CPU; None if that is left to torch.
    """
    facts = run.model_dump(mode="json", exclude={"model", "device", "seed"})
    if run.quantize is not None and run.quantize not in QUANTISED:
        facts["quantize"] = file_hash(run.quantize)
    if run.quantize is None:  # as in facts of versions that could not quantise
        del facts["quantize"]
    scene = facts["scene"]
    for concept in scene["concepts"]:
        concept["lora"] = _lora_hashes(concept["lora"])
        if concept["merge"] is None:  # as in facts of versions that could not merge
            del concept["merge"]
    scene["references"] = [_content(path) for path in scene["references"]]
    if not scene["references"]:  # as in facts of versions that could not read them
        del scene["references"]
    guides = [*scene["controls"], *scene["ip_adapters"]]
    for fields in (scene, *scene["concepts"], *guides):
        fields |= {name: _content(fields[name]) for name in ("image", "mask_image", "region") if name in fields}
    for guide in guides:
        guide["model"] = model_facts(expanded(guide["model"]), guide["model"])
    settings = vars(make_method(run.method, run.settings)) if run.method else {}
    complete = {name: repr(value) for name, value in settings.items()}  # defaults may change from version to version
    return [facts, complete, list(seeds), threads, *savers]


def digest(*facts: Any) -> str:
    """A short hash of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def model_facts(path: Path, name: str) -> Any:
    """Identifies a model: by hashes of its files if they are on this machine, otherwise by its name."""
    if path.is_file():
        return file_hash(str(path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _MODEL_FILES)
        return [[file.relative_to(path).as_posix(), file_hash(str(file))] for file in files]
    return name


def file_hash(path: str) -> str:
    """The SHA-256 of a file, read again in a process only if it has changed."""
    file = expanded(path)
    return _hash(file, file_key([file], None))


@lru_cache(maxsize=4096)
def _hash(file: Path, state: Hashable) -> str:
    return sha256_of(file)


def _lora_hashes(lora: str | list[str] | None) -> Any:
    """The hash of a file, or those of files that are merged with their weights; None without a LoRA (a bystander)."""
    if lora is None:
        return None
    if isinstance(lora, str):
        return _lora_hash(lora)
    return [[_lora_hash(source), weight] for source, weight in weighted(tuple(lora))]


def _lora_hash(lora: str) -> str:
    source = lora_source(lora)
    return file_hash(str(find_file(source) if local_path(source).exists() else _on_hub(source)))


@lru_cache(maxsize=4096)  # needs a request
def _on_hub(source: str) -> Path:
    return find_file(source)


def _content(named: Any) -> Any:
    """The hash of an image where a scene names one; boxes and masks given as text stay."""
    if not isinstance(named, str) or named.startswith(URI_PREFIX):
        return named
    try:
        return file_hash(named)
    except OSError as error:
        raise ValueError(f"the image {named!r} cannot be read: {error.strerror or error}") from error
