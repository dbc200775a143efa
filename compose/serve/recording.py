"""The record of a served image: as images of the command line have it, but without paths of the server."""

from pathlib import Path
from typing import Any

from lora_compose.compose.files.images import Record
from lora_compose.compose.files.paths import is_hub_name, moved_weights
from lora_compose.compose.generate.facts import file_hash
from lora_compose.compose.generate.machine import machine, versions
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.compose.serve.choosing import chosen_concepts
from lora_compose.compose.serve.requests import ImageRequest
from lora_compose.compose.support.frozen import shared
from lora_compose.pipelines.methods import ASKED_FOR
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.support.home import expanded

_NOT_IN_REQUESTS = frozenset(
    ("image", "mask_image", "strength", "padding_mask_crop", "paste_original", "references", "controls", "ip_adapters")
)
"""Fields of a scene that start from images, which requests have none of."""


def record_of(pipe: Any, run: Run, request: ImageRequest, reason: str | None, together: int) -> Record:
    """How an image of a batch of so many was made, by the model as it was opened, and why by this method.

    LoRAs are named by file, and found again by content (`replay --loras FOLDER`).
    """
    concepts, hashes = [], {}
    for asked in chosen_concepts(request):
        if asked.concept.is_bystander:
            concepts.append(asked.concept)
            continue
        path = expanded(files_of(pipe.concepts[asked.name].lora)[0])
        concepts.append(asked.concept.model_copy(update={"lora": path.name}))
        hashes[asked.name] = file_hash(str(path))
    scene = Scene(**shared(Scene.model_fields.keys() - _NOT_IN_REQUESTS, request, concepts=tuple(concepts)))
    public = run.model in PLAYGROUNDS or (is_hub_name(run.model) and not Path(run.model).exists())
    used = shared(
        Run.model_fields.keys() - {"dtype", "settings"}, request, scene=scene,
        model=run.model if public else Path(run.model).name, scheduler=type(pipe.scheduler).__name__,
        device=str(pipe._execution_device),
        quantize=moved_weights(run.quantize, lambda file: Path(file).name),
    )  # fmt: skip
    return Record(
        run=run.model_copy(update=used), versions=versions(), sha256=hashes, machine=machine(pipe._execution_device),
        together=together, method_reason=None if reason == ASKED_FOR else reason,
    )  # fmt: skip
