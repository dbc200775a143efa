"""`lora-compose check`: checks a run without generating an image."""

import logging
from pathlib import Path

import typer

from lora_compose.compose.commands import options
from lora_compose.compose.commands.asked import asked_run, seeds_of
from lora_compose.compose.support.spelling import as_options
from lora_compose.compose.support.terminal import BAD_INPUT, echo, handle_errors, starting


@handle_errors(logging.ERROR)
def check(
    model: options.ModelArgument,
    prompt: options.PromptOption = None,
    lora: options.LoraOption = None,
    box: options.BoxOption = None,
    concept: options.ConceptOption = None,
    loras: options.LorasOption = None,
    scene: options.SceneOption = None,
    method: options.MethodOption = None,
    settings: options.SetOption = None,
    seed: options.SeedsOption = None,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    negative_prompt: options.NegativeOption = None,
    width: options.WidthOption = None,
    height: options.HeightOption = None,
    image: options.ImageOption = None,
    reference: options.ReferenceOption = None,
    mask_image: options.MaskImageOption = None,
    strength: options.StrengthOption = None,
    padding_mask_crop: options.PaddingOption = None,
    paste_original: options.PasteOption = None,
    control: options.ControlOption = None,
    ip_adapter: options.IPAdapterOption = None,
    scheduler: options.SchedulerOption = None,
    dtype: options.DtypeOption = None,
    quantize: options.QuantizeOption = None,
    variant: options.VariantOption = None,
    device: options.DeviceOption = None,
    savers: options.SaversOption = None,
    out: options.OutOption = options.OUT,
    maps: options.MapsOption = False,
) -> None:
    """Show what a run matches, what it costs, and all its problems. Takes what `run` takes.

    Generates nothing.
    """
    asked = asked_run(locals(), looked_up=False)
    seeds = seeds_of(seed)
    with starting():
        from lora_compose.compose.check.report import check as check_run
    report = check_run(asked, loras=loras, variant=variant, savers=savers or ())
    facts = (*report.facts, ("saved memory", ", ".join(savers))) if savers else report.facts
    facts = (*facts, ("seeds", ", ".join(map(str, seeds))), ("images", _images_words(len(seeds), out, maps=maps)))
    wide = max(len(label) for label, _ in facts)
    for label, text in facts:
        echo(f"{label:{wide}}  {as_options(text) if label == 'method' else text}")
    for note in report.notes:
        echo(f"note: {as_options(note)}", style="yellow")
    for problem in report.problems:
        echo(f"problem: {as_options(problem)}", style="red")
    if report.problems:
        raise typer.Exit(BAD_INPUT)
    echo("no problems", style="green")


def _images_words(number: int, out: Path, *, maps: bool) -> str:
    """The files of a run: how many images, in which folder, and whether with sheets of attention maps."""
    images = f"{number} in {out}" if number == 1 else f"{number} and a contact sheet in {out}"
    return f"{images}, and for each a sheet of maps" if maps else images
