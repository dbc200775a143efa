"""`lora-compose run`: writes images of a run, one for each seed."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_compose.compose.figures.sheets import maps_sheet, seeds_sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.making import make_batch, size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import bar, err, say
from lora_compose.pipelines.concepts.selection import choose_concepts
from lora_compose.pipelines.scene import Concept, Run, Scene


def make_images(
    asked: Run,
    seeds: Sequence[int],
    out: Path,
    savers: Collection[Saver] = (),
    *,
    shares: Mapping[str, Sequence[float]] | None = None,
    loras: Path | None = None,
    maps: bool = False,
) -> None:
    """Generates images and prints their paths; several also go on a contact sheet.

    Args:
        asked: The run; its own seed is not used.
        seeds: One for each image.
        out: The folder for them.
        savers: Options that save memory.
        shares: Boxes as fractions of the canvas, by concept; pixels are known once the model is open.
        loras: A folder of LoRAs; those that the prompt names take part. None means the concepts of the scene.
        maps: Whether attention maps are written.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    with bar(f"opening {asked.model}"):
        pipe = open_model(asked, savers)
    if loras is not None:
        asked = asked.model_copy(update={"scene": _named(pipe, asked.scene, loras)})
    asked = asked.model_copy(update={"scene": _in_pixels(pipe, asked.scene, shares or {})})
    images, records = {}, []
    with bar(f"composing into {out}", len(seeds)) as on_progress:
        for i, seed in enumerate(seeds):
            batch = make_batch(
                pipe, asked.model_copy(update={"seed": seed}), (seed,),
                lambda share, done=i: on_progress(done + share), record_attention=maps,
            )  # fmt: skip
            made = batch.images[0]
            say(path := save_image(made.image, out / f"{seed}.png", made.record))
            if batch.attention is not None:
                say(save_image(maps_sheet(made.image, made.record.run, batch.attention), out / f"{seed}-maps.png"))
            images[seed] = made.image
            records.append((path, made.record))
    path, record = records[-1]
    if len(images) > 1:
        say(save_image(_seeds_sheet(images, record.run), out / "sheet.png"))
    say(f"{_how(record.run)}; to reproduce it: lora-compose replay {path}", style="dim", to=err)


def _named(pipe: Any, scene: Scene, loras: Path) -> Scene:
    """The scene with the LoRAs of a folder that its prompt names; prints them, and similar ones."""
    known = {concept.name: concept for concept in pipe.add_concepts(loras)}
    choice = choose_concepts(scene.prompt, known)
    for reason in choice.reasons:
        say(reason, style="dim", to=err)
    for note in choice.notes:
        say(f"note: {note}", style="yellow", to=err)
    return scene.model_copy(
        update={"prompt": choice.prompt, "concepts": tuple(known[name] for name in choice.names)}
    )  # fmt: skip


def box_in_pixels(share: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """A box given as fractions of the image, in whole pixels; at least one pixel wide and high."""
    left, top = (min(round(share[i] * side), side - 1) for i, side in ((0, width), (1, height)))
    return left, top, max(left + 1, round(share[2] * width)), max(top + 1, round(share[3] * height))


def _in_pixels(pipe: Any, scene: Scene, shares: Mapping[str, Sequence[float]]) -> Scene:
    size = size_of(pipe, scene)
    boxes = {name: box_in_pixels(share, *size) for name, share in shares.items()}
    concepts = (_with_box(concept, boxes) for concept in scene.concepts)
    return scene.model_copy(update={"concepts": tuple(concepts)})


def _with_box(concept: Concept, boxes: Mapping[str, tuple[int, int, int, int]]) -> Concept:
    return concept.model_copy(update={"region": boxes[concept.name]}) if concept.name in boxes else concept


def _how(made: Run) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in made.settings.items())
    method = made.method or "plain, without concepts"
    return f"made by {method}{f' ({settings})' if settings else ''}, {made.steps} steps, {made.scheduler}"


def _seeds_sheet(images: dict[int, Image.Image], made: Run) -> Image.Image:
    names = " + ".join(concept.name for concept in made.scene.concepts) or "no concepts"
    lines = [
        f"{names}, {made.method or 'plain'}",
        f"{made.steps} steps, guidance {made.guidance_scale:g}, {made.scheduler}",
    ]
    return seeds_sheet(images, made.scene.prompt, lines)
