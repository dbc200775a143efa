"""The command line: `lora-compose demo`, `run`, `check`, `replay`, `inspect`, `bench`, `evaluate`, `train` and more."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from pydantic import ValidationError

from lora_compose.compose.bench import bench
from lora_compose.compose.blind import blind
from lora_compose.compose.check import check as check_run
from lora_compose.compose.demo import SEEDS, Shown, jobs, show
from lora_compose.compose.evaluation.command import app as evaluation
from lora_compose.compose.files import (
    PLAYGROUND,
    complaints,
    parse_settings,
    read_pixels,
    read_record,
    read_scene,
    save_image,
)
from lora_compose.compose.inspect_command import inspect_files
from lora_compose.compose.lora.merge_command import merge
from lora_compose.compose.models import make_batch, open_model, threads
from lora_compose.compose.page.launch import ui
from lora_compose.compose.replay import changes, difference, remake, runnable
from lora_compose.compose.savers import SAVERS, Saver
from lora_compose.compose.sheets import maps_sheet, seeds_sheet
from lora_compose.compose.terminal import BAD_INPUT, FAILED, bar, kindly, say
from lora_compose.compose.training.command import train
from lora_compose.compose.version import __version__
from lora_compose.pipelines.scene import Concept, Run, Scene

_LAST_SEED = 2**63 - 1
_CONCEPT_FIELDS = {
    "path": "lora", "name": "name", "trigger": "trigger", "class": "class_word", "weight": "weight", "region": "region",
    "role": "role", "alpha": "alpha", "blocks": "blocks", "prompt": "prompt", "negative": "negative_prompt",
}  # fmt: skip
_CONCEPT_HELP = (
    "A concept, repeatable: path=cat.safetensors,trigger=sks,class=cat,weight=0.8,name=cat,region=64:32:128:96. "
    "Only path is needed; region is left, top, right and bottom in pixels, or a picture that is white inside; "
    "role=style is for what is everywhere. weight may change over the steps: 0:1,0.5:0 (off in the second half), "
    "1..0.4 (falls evenly), 1,0.5,0 (equal parts); blocks=down:0.5,up.1:0 are factors by block; prompt and negative "
    "are its own; alpha is for files that do not say theirs."
)

_WHAT_TO_LOOK_AT = (
    "What to look at: are all concepts there, each in the coat it wears alone in the first two columns? merge "
    "adds the LoRAs up, so coats mix (cat and dog) or a concept is lost. tara lets each LoRA change only what its "
    "own word says, and separates nothing in space: on this small model one coat often takes both. clora moves the "
    "concepts apart, sees from the model's attention where each of them is, and lets its LoRA act there. regional lets "
    "each LoRA act in its box only: clear coats, as long as the model puts each object into its own box, which it "
    "does not always do. lora-composer gives each box its own text as well, and so an object."
)

app = typer.Typer(
    help="Several concept LoRAs together in one diffusers image, every one with its own identity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(kindly()(bench))
app.command("inspect")(kindly(logging.ERROR)(inspect_files))
app.command()(kindly(logging.ERROR)(merge))
app.command()(train)
app.command()(ui)
app.add_typer(evaluation, name="evaluate")
app.add_typer(blind, name="blind")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="playground, a folder as diffusers saves it, a .safetensors file, or a hub repository."
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How concepts are fused; chosen by the LoRAs if not given. clora:official: its authors' settings.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, repeatable: cfg_mask=broadcast")
]
SaversOption = Annotated[
    list[Saver] | None,
    typer.Option(
        "--save-memory",
        help=f"Slower, with less memory; repeatable. {'; '.join(f'{name}: {what}' for name, what in SAVERS.items())}.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)]
GuidanceOption = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; 1 or less is none.")]


def main() -> None:
    """The entry point."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        say(f"lora-compose {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Several concept LoRAs together in one diffusers image, every one with its own identity."""


@app.command()
@kindly(logging.WARNING)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and sheet; a numbered one if it exists.")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[list[int] | None, typer.Option(help="A seed, repeatable.", min=0, max=_LAST_SEED)] = None,
    steps: StepsOption = 25,
) -> None:
    """Composes four scenes of the playground, offline, on the CPU, in two minutes."""
    todo = jobs(seed or SEEDS, steps)
    say(f"{len(todo)} pictures: three pairs, each concept alone and composed in five ways, and three concepts in boxes")
    with bar("composing", len(todo)) as on_progress:
        shown = show(out, todo, on_progress)
    _say_demo(shown)


def _say_demo(shown: Shown) -> None:
    say(f"The sheets: {shown.sheet} and {shown.three}", style="bold")
    say(f"The pictures, each with all that makes it again: {shown.folder} (try: lora-compose replay PICTURE)")
    say(_WHAT_TO_LOOK_AT)


@app.command()
@kindly()
def run(
    model: Annotated[str, typer.Argument(help="playground, a folder, a .safetensors file, or a hub repository.")],
    prompt: Annotated[str | None, typer.Option(help="Names every concept by its trigger.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help=_CONCEPT_HELP)] = None,
    scene: Annotated[Path | None, typer.Option(help="A scene file, YAML or JSON; options given beside it win.")] = None,
    method: MethodOption = None,
    settings: SetOption = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of the start noise, repeatable; 0 by default.", min=0, max=_LAST_SEED)
    ] = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = 5.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What is not to be seen.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Class name of a diffusers scheduler.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; chosen if not given.")] = None,
    savers: SaversOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures. Nothing in it is overwritten.")] = Path(
        "outputs/run"
    ),
    maps: Annotated[
        bool, typer.Option("--maps", help="Also a sheet for each picture: where the model looked for each concept.")
    ] = False,
) -> None:
    """Makes pictures: one per seed, and a sheet of them if there are several."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height}
    asked = _run(
        scene=_scene(scene, {name: value for name, value in given.items() if value is not None}, concept or []),
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
                say(save_image(maps_sheet(made, batch.attention), out / f"{one.seed}-maps.png"))
            pictures[one.seed] = made.image
            records.append(made.record)
    if len(pictures) > 1:
        say(save_image(_seeds_sheet(pictures, records[0].run), out / "sheet.png"))


@app.command()
@kindly(logging.ERROR)
def check(
    scene: Annotated[Path, typer.Argument(help="A scene file, YAML or JSON.")],
    model: ModelOption = PLAYGROUND,
    method: MethodOption = None,
    settings: SetOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = 5.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; chosen if not given.")] = None,
) -> None:
    """Says what of a scene matches the model and what it costs, and lists every problem, without making a picture."""
    report = check_run(
        _run(
            scene=read_scene(scene), model=model, method=method, settings=parse_settings(settings or []), steps=steps,
            guidance_scale=guidance, device=device,
        )
    )  # fmt: skip
    wide = max(len(label) for label, _ in report.facts)
    for label, text in report.facts:
        say(f"{label:{wide}}  {text}")
    for note in report.notes:
        say(f"note: {note}", style="yellow")
    for problem in report.problems:
        say(f"problem: {problem}", style="red")
    if report.problems:
        raise typer.Exit(BAD_INPUT)
    say("no problems", style="green")


@app.command()
@kindly(logging.WARNING)
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG that lora-compose has made.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the new picture; not written if not given.")] = None,
    loras: Annotated[
        Path | None, typer.Option(help="Folder in which LoRAs that have moved are found by content.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    savers: SaversOption = None,
) -> None:
    """Makes a picture again from what it carries, and says whether it is identical. Exit code 1 if not."""
    record, given = read_record(image), read_pixels(image)
    if loras is not None and not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}; --loras names a folder with safetensors files")
    asked = runnable(record, loras)
    asked = asked if model is None else asked.model_copy(update={"model": model})
    say(f"{asked.model}, {asked.method or 'no method'}, seed {asked.seed}, {asked.steps} steps: {asked.scene.prompt}")
    pipe = open_model(asked, savers or ())
    with threads(record.machine.threads), bar("composing", 1) as on_progress:
        made = remake(pipe, record, asked, on_progress)
    if out is not None:
        say(save_image(made.image, out, made.record))
    for change in changes(record, made.record):
        say(f"changed: {change}", style="yellow")
    found = difference(given, made.image)
    say(f"different: {found}" if found else "identical: every pixel is the same", style="red" if found else "green")
    if found:
        raise typer.Exit(FAILED)


def parse_concept(text: str) -> Concept:
    """Reads a concept as it is written on the command line.

    Args:
        text: Such as "path=cat.safetensors,trigger=sks,class=cat,weight=0.8". Commas in values are kept.

    Raises:
        ValueError: For unknown and missing fields and unusable values.
    """
    known = ", ".join(_CONCEPT_FIELDS)
    # A comma parts two fields only where a name and "=" follow.
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]
    fields: dict[str, Any] = {}
    for name, equals, value in ((name.strip(), equals, value.strip()) for name, equals, value in pairs):
        if not equals or name not in _CONCEPT_FIELDS:
            raise ValueError(f"--concept {text}: {name!r} is no field of a concept; expected {known}, each with =")
        if _CONCEPT_FIELDS[name] in fields:
            raise ValueError(f"--concept {text}: {name} is given twice")
        fields[_CONCEPT_FIELDS[name]] = value
    if not fields.get("lora"):
        raise ValueError(f"--concept {text}: path is missing: a safetensors file, a hub repository or playground:NAME")
    fields.setdefault("name", Path(fields["lora"].removeprefix(f"{PLAYGROUND}:")).stem)
    if "region" in fields:
        fields["region"] = _region(text, fields["region"])
    try:
        return Concept(**fields)
    except ValidationError as error:
        raise ValueError(f"--concept {text}: {'; '.join(complaints(Concept, error))}") from error


def _region(text: str, value: str) -> tuple[int, ...] | str:
    if value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")):
        return value
    if not re.fullmatch(r"\d+:\d+:\d+:\d+", value):
        raise ValueError(
            f"--concept {text}: region is left:top:right:bottom in whole pixels, or a picture that is white inside, "
            f"not {value!r}"
        )
    return tuple(int(number) for number in value.split(":"))


def _scene(path: Path | None, given: dict[str, Any], concepts: Sequence[str]) -> Scene:
    """A scene from a file, from options, or from a file with options that win."""
    if path is None and "prompt" not in given:
        raise ValueError("what is to be seen? Give --prompt TEXT or --scene FILE")
    if path is not None and concepts:
        raise ValueError("give the concepts in the scene file or with --concept, not both")
    fields: dict[str, Any] = {"concepts": tuple(map(parse_concept, concepts))}
    if path is not None:
        fields = dict(read_scene(path))
    try:
        return Scene(**{**fields, **given})
    except ValidationError as error:
        raise ValueError("\n".join(complaints(Scene, error))) from error


def _run(**fields: Any) -> Run:
    try:
        return Run(**fields)
    except ValidationError as error:
        raise ValueError("\n".join(complaints(Run, error))) from error


def _distinct_seeds(seeds: Sequence[int] | None) -> list[int]:
    return list(dict.fromkeys(seeds or [0]))


def _seeds_sheet(pictures: dict[int, Image.Image], made: Run) -> Image.Image:
    names = " + ".join(concept.name for concept in made.scene.concepts) or "no concepts"
    lines = [
        f"{names}, {made.method or 'plain'}",
        f"{made.steps} steps, guidance {made.guidance_scale:g}, {made.scheduler}",
    ]
    return seeds_sheet(pictures, made.scene.prompt, lines)
