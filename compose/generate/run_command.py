"""`lora-compose run`: makes images of a scene."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from lora_compose.compose.figures.sheets import maps_sheet, seeds_sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.making import make_batch
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.options import (
    CONCEPT_HELP,
    LAST_SEED,
    GuidanceOption,
    ImageOption,
    MaskImageOption,
    MethodOption,
    PaddingOption,
    PasteOption,
    SaversOption,
    SetOption,
    StepsOption,
    StrengthOption,
    parse_settings,
    run_of,
    scene_of,
    starting_from,
)
from lora_compose.compose.support.terminal import bar, kindly, say
from lora_compose.pipelines.scene import Run


@kindly()
def run(
    model: Annotated[str, typer.Argument(help="playground, a folder, a .safetensors file, or a hub repository.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt. It names every concept by its trigger.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help=CONCEPT_HELP)] = None,
    scene: Annotated[Path | None, typer.Option(help="A scene file, YAML or JSON; other options override it.")] = None,
    method: MethodOption = None,
    settings: SetOption = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of the start noise, repeatable; 0 by default.", min=0, max=LAST_SEED)
    ] = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = 5.0,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt: what to avoid.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; default: that of --image, or the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; default: that of --image, or the model's own.")] = None,
    image: ImageOption = None,
    mask_image: MaskImageOption = None,
    strength: StrengthOption = None,
    padding_mask_crop: PaddingOption = None,
    paste_original: PasteOption = None,
    scheduler: Annotated[str | None, typer.Option(help="Class name of a diffusers scheduler.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the fastest.")] = None,
    savers: SaversOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the images. Existing files are not overwritten.")] = Path(
        "outputs/run"
    ),
    maps: Annotated[
        bool, typer.Option("--maps", help="Also write a sheet of attention maps and masks for each image.")
    ] = False,
) -> None:
    """Generate images: one per seed, and a contact sheet if there are several."""
    given = {
        "prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height,
        **starting_from(image, mask_image, strength, padding_mask_crop, paste_original),
    }  # fmt: skip
    asked = run_of(
        scene=scene_of(scene, {name: value for name, value in given.items() if value is not None}, concept or []),
        model=model, method=method, settings=parse_settings(settings or []), scheduler=scheduler, steps=steps,
        guidance_scale=guidance, dtype=dtype, device=device,
    )  # fmt: skip
    runs = [asked.model_copy(update={"seed": number}) for number in _distinct_seeds(seed)]
    pipe = open_model(asked, savers or ())
    pictures, records = {}, []
    with bar("composing", len(runs)) as on_progress:
        for i, one in enumerate(runs):
            batch = make_batch(
                pipe, one, (one.seed,), lambda share, done=i: on_progress(done + share), record_attention=maps
            )
            made = batch.pictures[0]
            say(save_image(made.image, out / f"{one.seed}.png", made.record))
            if batch.attention is not None:
                say(save_image(maps_sheet(made.image, made.record.run, batch.attention), out / f"{one.seed}-maps.png"))
            pictures[one.seed] = made.image
            records.append(made.record)
    if len(pictures) > 1:
        say(save_image(_seeds_sheet(pictures, records[0].run), out / "sheet.png"))


def _distinct_seeds(seeds: Sequence[int] | None) -> list[int]:
    return list(dict.fromkeys(seeds or [0]))


def _seeds_sheet(pictures: dict[int, Image.Image], made: Run) -> Image.Image:
    names = " + ".join(concept.name for concept in made.scene.concepts) or "no concepts"
    lines = [
        f"{names}, {made.method or 'plain'}",
        f"{made.steps} steps, guidance {made.guidance_scale:g}, {made.scheduler}",
    ]
    return seeds_sheet(pictures, made.scene.prompt, lines)
