"""Concepts merged into one LoRA file, by ComfyUI's names of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from lora_compose.attention import Lora, LoraFactors
from lora_compose.compose.comfyui.concepts import NodeConcept
from lora_compose.compose.comfyui.files import read_text_encoders
from lora_compose.compose.lora.merging import Given, Matched, Report, merge_files
from lora_compose.pipelines.formats.by_name import by_name
from lora_compose.pipelines.formats.files import read_lora
from lora_compose.pipelines.formats.lora_writer import FileLayer
from lora_compose.pipelines.merging import make_merger
from lora_compose.pipelines.merging.changes import Name, check_number, side_by_side
from lora_compose.pipelines.merging.expressed import expressed


def merge_concepts(
    concepts: Sequence[NodeConcept], loras: Sequence[Lora], network: nn.Module, method: str, out: Path
) -> Report:
    """Merges the files of two or more concepts, with their weights, into a new one; bystanders have none.

    `loras` are the factors of the others in the model, without products, and `network` is ComfyUI's `diffusion_model`,
    whose weights DoRA and OFT need; `method` needs no images. Raises ValueError if they cannot be merged; nothing is
    written then.
    """
    merger = make_merger(method)
    paths = [concept.path for concept in concepts if concept.path is not None]
    concepts = [concept for concept in concepts if concept.path is not None]
    names = [concept.scene.name for concept in concepts]
    if len(concepts) < 2:
        raise ValueError("there is nothing to merge: chain two concepts with LoRAs or more")
    check_number(merger, method, len(concepts))
    weights = [concept.weight.constant for concept in concepts]
    for concept, weight in zip(concepts, weights, strict=True):
        if weight is None:
            raise ValueError(f"{concept.scene.name} has a schedule, but a file has no steps; clear it in its Concept")
    if not any(weights):
        raise ValueError("every weight is 0; there is nothing to merge")
    given, every, notes = [], [], []
    layers: dict[Name, FileLayer] = {}
    for called, path, lora, weight in zip(names, paths, loras, weights, strict=True):
        file = read_lora(path)
        named: Mapping[Name, LoraFactors] = {("transformer", name): factors for name, factors in lora.items()}
        named, note = expressed(SimpleNamespace(transformer=network), named, called)
        texts, _ = by_name(replace(file, tensors=read_text_encoders(file)))
        stems = {name: f"diffusion_model.{name[1]}" for name in named}
        stems |= {name: layer.stem for name, layer in texts.items()}
        named = {**named, **{name: layer.factors for name, layer in texts.items()}}
        for name, factors in named.items():
            layers.setdefault(name, FileLayer(stems[name], tuple(factors.down.shape[2:])))
        given.append(Given(called, file, weight or 0.0))
        every.append(named)
        notes += [] if note is None else [f"{called}: {note}"]
    changes = side_by_side(every, [file.weight for file in given], [file.source for file in given])
    matched = Matched(given, changes, layers, "diffusers", tuple(notes))
    return merge_files(matched, merger, out, method=method)
