"""Options that several commands share; `asked` reads what they say."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.support.names import METHODS, PRESETS
from lora_compose.compose.support.savers import SAVERS, Saver
from lora_compose.pipelines.support.quantising import QUANTISED

LORA_HELP = (
    "A LoRA, repeatable, with its weight if that is not 1: cat.safetensors:0.8, playground:bear, user/my-cat. Trigger "
    "and class word come from the file's metadata; --concept gives them to files without."
)
BOX_HELP = (
    "The box of a LoRA, repeatable: the first for the first --lora, and so on; none for one without. left,top,right,"
    "bottom, in pixels (0,16,60,112) or as fractions of the image (0,0.1,0.5,0.9)."
)
LORAS_HELP = (
    "A folder of LoRAs. The prompt selects those that it names: by trigger, or by a class word that only one of them "
    "has."
)
CONCEPT_HELP = (
    "A concept in full, repeatable: path=cat.safetensors,trigger=sks,class=cat. Further fields: weight=0.8, name=cat, "
    "region=64,32,128,96. Only path is required; region is left,top,right,bottom in pixels or as fractions of the "
    "image (0,0.1,0.5,0.9), or a mask image (white = inside); role=style makes it act everywhere; "
    "role=bystander,class=man, without path, is a subject that LoRAs keep off. Several files, path="
    "cat.safetensors,path=style.safetensors:0.7, are merged; merge names the method. weight may change over "
    "the steps: 0:1,0.5:0 (off in the second half), 1..0.4 (linear ramp), 1,0.5,0 (equal parts); "
    "blocks=down:0.5,up.1:0 are factors by block; any_weight=true allows weights beyond 10; prompt and negative are "
    "its own; references=true makes it act on reference images, too; alpha is for files without one."
)


MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help=f"How concepts are fused: {', '.join(METHODS)}; with the authors' settings {', '.join(PRESETS)}. Default: "
        "chosen from the concepts. `lora-compose methods` describes each.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method, repeatable, e.g. cfg_mask=broadcast. `lora-compose methods METHOD` lists them.",
    ),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", help="The prompt. It names every concept by its trigger.")
]
NegativeOption = Annotated[str | None, typer.Option("--negative-prompt", help="Negative prompt: what to avoid.")]
LoraOption = Annotated[list[str] | None, typer.Option("--lora", help=LORA_HELP)]
BoxOption = Annotated[list[str] | None, typer.Option("--box", help=BOX_HELP)]
ConceptOption = Annotated[list[str] | None, typer.Option("--concept", help=CONCEPT_HELP)]
LorasOption = Annotated[Path | None, typer.Option("--loras", help=LORAS_HELP)]
SceneOption = Annotated[
    Path | None, typer.Option("--scene", help="A scene file, YAML or JSON; other options override it.")
]
WidthOption = Annotated[
    int | None, typer.Option("--width", help="In pixels; default: that of --image, or the model's own.")
]
HeightOption = Annotated[
    int | None, typer.Option("--height", help="In pixels; default: that of --image, or the model's own.")
]
SchedulerOption = Annotated[str | None, typer.Option("--scheduler", help="Class name of a diffusers scheduler.")]
SaversOption = Annotated[
    list[Saver] | None,
    typer.Option(
        "--save-memory",
        help=f"Save memory; slower; repeatable. {'; '.join(f'{name}: {what}' for name, what in SAVERS.items())}.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        help="Work on a Ray cluster, whose machines need no shared folder; --processes is then its number of workers, "
        "by default one per GPU, or one per node without GPUs.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", help="Denoising steps; default: the model's own, on every device; see `check`.", min=1),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Guidance scale of CFG; 1 or less turns it off, in some families only 0; default: the model's own.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, float16 or bfloat16; default: float32 on a CPU; on a GPU float16 for UNets, bfloat16 for "
        "transformers.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="NAME|FILE",
        help=f"Open the model in fewer bits. {'; '.join(f'{name}: {what}' for name, what in QUANTISED.items())}; or a "
        "file of the denoiser, .gguf or .safetensors in fp8.",
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="The variant of the model's weights, such as fp16; default: fp16 in half precision, where the model has "
        "it.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps or xpu; default: the fastest.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="playground, a folder as diffusers saves it, a .safetensors file, or a hub repository."
    ),
]
SeedsOption = Annotated[
    list[str] | None, typer.Option("--seed", help="Seed of the start noise, repeatable: 3, or 0-7. Default: 0.")
]
OutOption = Annotated[Path, typer.Option(help="Folder for the images. Existing files are not overwritten.")]
OUT = Path("outputs/run")
MapsOption = Annotated[
    bool, typer.Option("--maps", help="Also write a sheet of attention maps and masks for each image.")
]
ImageOption = Annotated[str | None, typer.Option("--image", help="Start from this image (image-to-image).")]
ReferenceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        metavar="FILE",
        help="An image that the model reads beside the prompt, repeatable; for FLUX.1 Kontext, FLUX.2, FLUX.3 and "
        "Qwen-Image-Edit-Plus.",
    ),
]
MaskImageOption = Annotated[
    str | None,
    typer.Option(
        "--mask-image",
        help="Inpaint only there: a mask image (white = painted), or left,top,right,bottom in pixels or "
        "as fractions of the image.",
    ),
]
StrengthOption = Annotated[
    float | None, typer.Option("--strength", help="Fraction of the steps that are run, 0 to 1: higher changes more.")
]
PaddingOption = Annotated[
    int | None,
    typer.Option(
        "--padding-mask-crop", min=0, help="Pixels around the mask: only that part is painted, enlarged to the size."
    ),
]
PasteOption = Annotated[
    bool | None,
    typer.Option("--paste-original/--no-paste-original", help="Keep the image's own pixels outside of the mask."),
]
ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="A control image with its ControlNet or T2I-Adapter, repeatable: model=FOLDER,image=pose.png,scale=0.8. "
        "Further fields: start and end (parts of the steps), regions=cat:1,dog:0 (scales inside their regions).",
    ),
]
IPAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ip-adapter",
        help="An IP-Adapter with its image, repeatable: model=FOLDER,weight_name=FILE.safetensors,image=face.png. "
        "Further fields: subfolder, image_encoder, scale, region (a mask image, or left,top,right,bottom).",
    ),
]


def with_options_of(command: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, which takes them by name, all options of another one."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function.__dict__["__signature__"] = signature(command)
        return function

    return decorate
