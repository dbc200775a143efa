"""Times to register LoRA files, to read one, and to swap one in memory for another."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lora_compose.attention import BankCache, Site, backbone_of, install, installed_layers
from lora_compose.compose.benchmark.architectures import without_weights
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept

RANK = 16
_FILES = 4
_ADAPTED = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2", "q_proj", "k_proj", "v_proj",
            "out_proj", ".fc1", ".fc2")  # fmt: skip


@dataclass(frozen=True)
class Swaps:
    """Medians, in milliseconds by file, and a file's size.

    `adding` registers it by its header, `reading` is the first call that names it (reading, checking, matching),
    `swapping` every further call, while it is in memory. `installing` copies it to the device, installs it in UNet and
    text encoder and removes it, in the first call; `installing_again` is every further call, which finds it on the
    device.
    """

    file_bytes: int
    adding: float
    reading: float
    swapping: float
    installing: float
    installing_again: float


def measure_swaps(device: str = "cpu", repeats: int = 5) -> Swaps:
    """Measures with SD 1.5, without weights, and LoRAs of rank 16 on all linear layers of its blocks, in float16."""
    parts = without_weights("SD 1.x")
    pipe = pipeline_of(parts.unet, scheduler(), text_encoder=parts.text_encoder)
    with tempfile.TemporaryDirectory() as folder:
        size = _write_files(pipe, Path(folder))
        adding = _milliseconds(lambda: pipe.add_concepts(folder)) / _FILES

        def named(name: str) -> float:
            return _milliseconds(lambda: pipe.resolve_concepts([name]))

        reading = [named(name) for name in pipe.concepts]
        swapping = [named(name) for _ in range(repeats) for name in pipe.concepts]
        loaded = pipe.resolve_concepts([*pipe.concepts])
    installing, again = [], []
    for concept in loaded * repeats:
        install_it = partial(_install, pipe, concept, device, BankCache(pipe.bank_memory))
        installing.append(_milliseconds(install_it))
        again.append(_milliseconds(install_it))
    return Swaps(size, adding, *map(statistics.median, (reading, swapping, installing, again)))


def _write_files(pipe: Any, folder: Path) -> int:
    """Writes LoRAs with random numbers, and returns the bytes of one."""
    generator = torch.Generator().manual_seed(0)
    path = folder / "none"
    for i in range(_FILES):
        path = folder / f"{i}.safetensors"
        tensors = {}
        for part in ("unet", "text_encoder"):
            for name, module in getattr(pipe, part).named_modules():
                if isinstance(module, nn.Linear) and f".{name}".endswith(_ADAPTED):
                    down, up = (RANK, module.in_features), (module.out_features, RANK)
                    for side, shape in (("lora_A", down), ("lora_B", up)):
                        tensors[f"{part}.{name}.{side}.weight"] = torch.randn(shape, generator=generator).half()
        save_file(tensors, path)
    return path.stat().st_size


def _install(pipe: Any, loaded: LoadedConcept, device: str, banks: BankCache) -> None:
    to: dict[str, Any] = {"device": torch.device(device), "dtype": torch.float16}
    text, concepts = {name: Site("text") for name, _ in pipe.text_encoder.named_modules()}, ConceptSet((loaded,))
    kept = {part: concepts.kept(part, banks) for part in loaded.factors.by_part}
    with (
        installed_layers(
            pipe.text_encoder, [loaded.factors.text_encoders["text_encoder"]], text, **to, kept=kept["text_encoder"]
        ) as installation,
        install(backbone_of(pipe.unet), [loaded.factors.model], **to, kept=kept["unet"]),
    ):
        next(iter(installation.bank.values())).down.sum().item()  # waits for the device


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)
