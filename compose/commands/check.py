"""`lora-compose check`: checks a run without generating an image."""

import logging

import typer

from lora_compose.compose.commands import options
from lora_compose.compose.commands.asked import asked_run
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
) -> None:
    """Show what a run matches, what it costs, and all its problems. Takes what `run` takes.

    Generates nothing.
    """
    asked = asked_run(locals(), looked_up=False)
    with starting():
        from lora_compose.compose.check.report import check as check_run
    report = check_run(asked, loras=loras, variant=variant)
    wide = max(len(label) for label, _ in report.facts)
    for label, text in report.facts:
        echo(f"{label:{wide}}  {as_options(text) if label == 'method' else text}")
    for note in report.notes:
        echo(f"note: {as_options(note)}", style="yellow")
    for problem in report.problems:
        echo(f"problem: {as_options(problem)}", style="red")
    if report.problems:
        raise typer.Exit(BAD_INPUT)
    echo("no problems", style="green")
