"""`lora-compose run`: generates images of a scene."""

from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands import options
from lora_compose.compose.support.terminal import handle_errors, starting


@handle_errors()
def run(
    model: Annotated[str, typer.Argument(help="playground, a folder, a .safetensors file, or a hub repository.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt. It names every concept by its trigger.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help=options.LORA_HELP)] = None,
    box: Annotated[list[str] | None, typer.Option(help=options.BOX_HELP)] = None,
    concept: Annotated[list[str] | None, typer.Option(help=options.CONCEPT_HELP)] = None,
    loras: Annotated[Path | None, typer.Option(help=options.LORAS_HELP)] = None,
    scene: Annotated[Path | None, typer.Option(help="A scene file, YAML or JSON; other options override it.")] = None,
    method: options.MethodOption = None,
    settings: options.SetOption = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of the start noise, repeatable; 0 by default.", min=0, max=options.LAST_SEED),
    ] = None,
    steps: options.StepsOption = 25,
    guidance: options.GuidanceOption = 5.0,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt: what to avoid.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; default: that of --image, or the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; default: that of --image, or the model's own.")] = None,
    image: options.ImageOption = None,
    mask_image: options.MaskImageOption = None,
    strength: options.StrengthOption = None,
    padding_mask_crop: options.PaddingOption = None,
    paste_original: options.PasteOption = None,
    control: options.ControlOption = None,
    ip_adapter: options.IPAdapterOption = None,
    scheduler: Annotated[str | None, typer.Option(help="Class name of a diffusers scheduler.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the fastest.")] = None,
    savers: options.SaversOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the images. Existing files are not overwritten.")] = Path(
        "outputs/run"
    ),
    maps: Annotated[
        bool, typer.Option("--maps", help="Also write a sheet of attention maps and masks for each image.")
    ] = False,
) -> None:
    """Generate images: one per seed, and a contact sheet of several."""
    given = {
        "prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height,
        "image": image, "mask_image": None if mask_image is None else options.mask_or_box(mask_image, "--mask-image"),
        "strength": strength, "padding_mask_crop": padding_mask_crop, "paste_original": paste_original,
        **options.guided_by(control, ip_adapter),
    }  # fmt: skip
    concepts = options.concepts_of(concept or [], lora or [], box or [])
    asked = options.run_of(
        scene=options.scene_of(scene, {name: value for name, value in given.items() if value is not None}, concepts),
        model=model, method=method, settings=options.parse_settings(settings or []), scheduler=scheduler, steps=steps,
        guidance_scale=guidance, dtype=dtype, device=device,
    )  # fmt: skip
    options.check_names(asked)
    if loras is not None:
        options.check_folder(loras, asked)
    seeds = list(dict.fromkeys(seed or [0]))
    with starting():
        from lora_compose.compose.generate.images import make_images
    make_images(asked, seeds, out, savers or (), loras=loras, maps=maps)
