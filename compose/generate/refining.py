"""`lora-compose refine`: repaints each subject of an image that has a record."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.generate.guides import fit_ip_adapters, ip_adapter_arguments
from lora_compose.compose.generate.making import load, make_batch
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.replay import runnable
from lora_compose.compose.generate.schedulers import scheduler_of
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import bar, echo
from lora_compose.pipelines.calls.refine import Detailer, refine, subject_masks
from lora_compose.pipelines.scene.scene import Run


def refine_and_save(
    record: Record,
    image: Image.Image,
    out: Path,
    *,
    strength: float = 0.5,
    subjects: Sequence[str] = (),
    method: str | None = None,
    loras: Path | None = None,
    model: str | None = None,
    savers: Collection[Saver] = (),
) -> None:
    """Repaints the subjects of an image and writes the result.

    Args:
        out: The file to write; no file is overwritten.
        subjects: Names of concepts; empty means all.
        loras: A folder in which moved LoRAs are found by content.

    Raises:
        ValueError: For unknown subjects, and if LoRAs or the model are missing.
    """
    run = runnable(record, loras)
    run = run if model is None else run.model_copy(update={"model": model})
    known = [c.name for c in run.scene.concepts if not (c.is_style or c.is_bystander)]
    if unknown := sorted(set(subjects) - set(known)):
        raise ValueError(f"--subject {', '.join(unknown)}: the subjects of this image are {', '.join(known) or 'none'}")
    with bar(f"opening {run.model}"):
        pipe = open_model(run, savers)
    masks = _masks(pipe, record, run, image)
    chosen = {name: mask for name, mask in masks.items() if not subjects or name in subjects}
    concepts = [load(pipe, concept).concept for concept in run.scene.concepts]
    without = [concept.model_copy(update={"region": None}) for concept in concepts]
    pipe.scheduler = scheduler_of(pipe, run)
    # A part of the image is repainted, which the masks of the others are not made for.
    everywhere = [adapter for adapter in run.scene.ip_adapters if adapter.region is None]
    fit_ip_adapters(pipe, everywhere)
    repainted = refine(
        pipe, image, run.scene.prompt, without, chosen, Detailer(strength=strength, method=method),
        num_inference_steps=run.steps, **pipe.guided(run.guidance_scale, run.scene.negative_prompt or None),
        generator=torch.Generator().manual_seed(run.seed), **ip_adapter_arguments(everywhere, image.size),
    )  # fmt: skip
    echo(save_image(repainted.image, out))
    echo(
        f"repainted {', '.join(repainted.subjects)}: {repainted.cost.rows_forward:g} rows, each a latent through the "
        "model once"
    )


def _masks(pipe: Any, record: Record, run: Run, image: Image.Image) -> dict[str, Any]:
    """Masks of the subjects with a LoRA: their regions, or the masks of the same run, which is repeated."""
    subjects = [concept for concept in run.scene.concepts if not concept.is_bystander]
    regions = {concept.name: concept.region for concept in subjects if concept.region is not None}
    if regions:
        return regions
    seeds = record.batch or (run.seed,)
    with bar("finding the subjects", 1) as on_progress:
        batch = make_batch(pipe, run, seeds, on_progress, record_attention=True)
    if batch.attention is None:
        raise ValueError("this image has no concepts, so there is nothing to repaint")
    middle = len(batch.attention.steps) // 2  # by then masks are stable, and subjects are still where they were begun
    masks = batch.attention.masks[middle, seeds.index(run.seed)]
    return dict(subject_masks(masks, run.scene.concepts, image.size))
