"""`lora-compose run`: writes images of a run, one for each seed."""

from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image

from lora_compose.compose.figures.sheets import maps_sheet, seeds_sheet
from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.generate.defaults import complete
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.generate.making import make_batch
from lora_compose.compose.generate.models import open_model, opening
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.spelling import as_options
from lora_compose.compose.support.terminal import bar, echo, err
from lora_compose.pipelines.concepts.library import by_headers
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.text.selection import choose_concepts


def make_images(
    run: Run,
    seeds: Sequence[int],
    out: Path,
    savers: Collection[Saver] = (),
    *,
    loras: Path | None = None,
    maps: bool = False,
    variant: str | None = None,
) -> None:
    """Generates images and prints their paths; several also go on a contact sheet.

    Args:
        run: The run; its own seed is not used.
        loras: A folder of LoRAs; those that the prompt names take part. None means the concepts of the scene.
        variant: As for `open_model`.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    if loras is not None:
        run = run.model_copy(update={"scene": named_in(run.scene, loras)})
    check_early(run)
    run, told = complete(run)
    if told:
        echo(told, style="dim", to=err)
    with opening(run.model):
        pipe = open_model(run, savers, variant)
    images, saved = {}, []
    with bar(f"composing into {out}", len(seeds)) as on_progress:
        for i, seed in enumerate(seeds):
            batch = make_batch(
                pipe, run.model_copy(update={"seed": seed}), (seed,),
                lambda share, done=i: on_progress(done + share), record_attention=maps,
            )  # fmt: skip
            made, record = batch.images[0], batch.images[0].record
            if saved:  # the method was chosen once, for the first
                record = record.model_copy(update={"method_reason": saved[0][1].method_reason})
            echo(path := save_image(made.image, out / f"{seed}.png", record))
            if batch.attention is not None:
                echo(save_image(maps_sheet(made.image, record.run, batch.attention), out / f"{seed}-maps.png"))
            images[seed] = made.image
            saved.append((path, record))
            run = run.model_copy(update={name: getattr(record.run, name) for name in ("method", "settings")})
    path, record = saved[-1]
    if len(images) > 1:
        echo(save_image(_seeds_sheet(images, record.run), out / "sheet.png"))
    echo(f"{_how(record)}; to reproduce it: lora-compose replay {path}", style="dim", to=err)


def named_in(scene: Scene, loras: Path) -> Scene:
    """The scene with the LoRAs of a folder that its prompt names, by their headers; prints them, and similar ones."""
    known = {name: entry.concept for name, entry in by_headers(loras).items()}
    choice = choose_concepts(scene.prompt, known)
    for reason in choice.reasons:
        echo(reason, style="dim", to=err)
    for note in choice.notes:
        echo(f"note: {note}", style="yellow", to=err)
    concepts = tuple(
        known[name].model_copy(update={"weight": choice.weights[name]} if name in choice.weights else {})
        for name in choice.names
    )
    return scene.model_copy(update={"prompt": choice.prompt, "concepts": concepts})


def _how(record: Record) -> str:
    made, reason = record.run, record.method_reason
    settings = ", ".join(f"{name}={value}" for name, value in made.settings.items())
    method = made.method or "plain, without concepts"
    why = f", because {as_options(reason)}" if reason else ""
    return f"made by {method}{f' ({settings})' if settings else ''}{why}, {made.steps} steps, {made.scheduler}"


def _seeds_sheet(images: dict[int, Image.Image], made: Run) -> Image.Image:
    names = " + ".join(concept.name for concept in made.scene.concepts) or "no concepts"
    lines = [
        f"{names}, {made.method or 'plain'}",
        f"{made.steps} steps, guidance {made.guidance_scale:g}, {made.scheduler}",
    ]
    return seeds_sheet(images, made.scene.prompt, lines)
