"""`lora-compose refine`: repaints each subject of an image that has a record."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.files.atomic import check_writable
from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.generate.guides import fit_ip_adapters, ip_adapter_arguments
from lora_compose.compose.generate.making import load, make_batch
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.replay import runnable
from lora_compose.compose.generate.schedulers import scheduler_of
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import bar, echo
from lora_compose.pipelines.calls.refine import Detailer, refine, subject_masks
from lora_compose.pipelines.calls.resolved_call import check_start_for
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.regions import read_mask
from lora_compose.pipelines.scene.scene import Run, Scene


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
        ValueError: For unknown subjects and methods, and if LoRAs or the model are missing or do not fit.
        OSError: If the result cannot be written; the model is not opened then.
    """
    run = runnable(record, loras)
    run = run if model is None else run.model_copy(update={"model": model})
    known = [c.name for c in run.scene.concepts if not (c.is_style or c.is_bystander)]
    if unknown := sorted(set(subjects) - set(known)):
        raise ValueError(f"--subject {', '.join(unknown)}: the subjects of this image are {', '.join(known) or 'none'}")
    if not known:
        raise ValueError("this image has no subjects with a LoRA, so there is nothing to repaint")
    _check(run, method, strength)
    check_writable(out)
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


def _check(run: Run, method: str | None, strength: float) -> None:
    """Raises ValueError for what is wrong with the run or the method, as far as no model is needed to see it."""
    facts, scene = facts_of(run.model), run.scene
    facts.family.task_for(inpaints=True)
    if method is not None:
        check_start_for(make_method(method, {}), strength)
    regions = _regions(run)
    if not regions:  # otherwise the image itself is not made again
        check_early(run, facts)
    for mask in filter(lambda region: isinstance(region, str), regions.values()):
        read_mask(mask)
    styles = [concept for concept in scene.concepts if concept.is_style]
    adapters = tuple(adapter for adapter in scene.ip_adapters if adapter.region is None)
    for subject in scene.concepts:
        if subject.is_style or subject.is_bystander:
            continue
        acting = (subject.model_copy(update={"region": None, "prompt": None}), *styles)
        alone = Scene(prompt=subject.prompt or scene.prompt, concepts=acting, ip_adapters=adapters)
        check_early(run.model_copy(update={"scene": alone, "method": method, "settings": {}}), facts)


def _regions(run: Run) -> dict[str, Any]:
    """The regions of the subjects that have a LoRA and a region, by name."""
    subjects = [concept for concept in run.scene.concepts if not concept.is_bystander]
    return {concept.name: concept.region for concept in subjects if concept.region is not None}


def _masks(pipe: Any, record: Record, run: Run, image: Image.Image) -> dict[str, Any]:
    """Masks of the subjects with a LoRA: their regions, or the masks of the same run, which is repeated."""
    if regions := _regions(run):
        return regions
    seeds = record.batch or (run.seed,)
    with bar("finding the subjects", 1) as on_progress:
        batch = make_batch(pipe, run, seeds, on_progress, record_attention=True)
    assert batch.attention is not None  # the run has concepts
    middle = len(batch.attention.steps) // 2  # by then masks are stable, and subjects are still where they were begun
    masks = batch.attention.masks[middle, seeds.index(run.seed)]
    return dict(subject_masks(masks, run.scene.concepts, image.size))
