"""`lora-compose bench`: costs of methods."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.asked import parse_settings
from lora_compose.compose.commands.options import DeviceOption, DtypeOption
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.names import DTYPES, METHODS, STRUCTURES, check_method, unknown
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import handle_errors, starting

MOST_CONCEPTS = 13


@handle_errors(logging.ERROR)
def bench(
    methods: Annotated[list[str] | None, typer.Option("--method", help="A method, repeatable; default: all.")] = None,
    concepts: Annotated[
        list[int] | None,
        typer.Option("--concepts", "-n", help="Number of concepts; repeatable.", min=1, max=MOST_CONCEPTS),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the methods, repeatable, e.g. fuse=branches")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    count: Annotated[
        bool, typer.Option("--count", help="Count latent rows and FLOPs on SD 1.5 and SDXL; the default.")
    ] = False,
    boxes: Annotated[
        bool, typer.Option("--boxes", help="Count with a box for each concept, also where a method needs none.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Compute the peak memory of SD 1.5 and SDXL in half precision.")
    ] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Count a pass of every supported transformer with regional.")
    ] = False,
    references: Annotated[
        int, typer.Option(help="With --transformers: passes that read so many reference images of 1024 x 1024.", min=0)
    ] = 0,
    hardware: Annotated[
        bool, typer.Option("--hardware", help="Compute what models of several families need: GiB and TFLOP.")
    ] = False,
    calls: Annotated[
        bool, typer.Option("--calls", help="Count Python calls and tensor operations of real calls.")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Measure seconds and memory of real calls, and of PEFT.")
    ] = False,
    swap: Annotated[
        bool,
        typer.Option(
            "--swap",
            help="Measure the time to read a LoRA file, to swap it for another, and between requests that need others "
            "of many, with PEFT too.",
        ),
    ] = False,
    loaded: Annotated[int, typer.Option(help="LoRAs that are loaded for the requests of --swap.", min=5)] = 57,
    growth: Annotated[
        Path | None,
        typer.Option(help="Count costs against concepts, stored LoRAs, images and sizes, and draw them into this PNG."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="The model to run: playground, a folder, a file, a hub repository, or random:sd-1.5, which has random "
            "weights."
        ),
    ] = PLAYGROUND,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    size: Annotated[
        int | None, typer.Option(help="Width and height of the images of --time, --calls and --swap.", min=64)
    ] = None,
    savers: Annotated[
        list[Saver] | None, typer.Option("--save-memory", help="Time with less memory, repeatable.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Number of interleaved rounds of timed runs.", min=1)] = 7,
    peaks: Annotated[bool, typer.Option(help="With --time, measure memory too, each in a process of its own.")] = True,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Show the costs of methods, relative to a plain image.

    LoRAs are random, of rank 8, on all attention layers.
    """
    for method in methods or ():
        check_method(method)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    if model not in STRUCTURES:
        model_source(model)
    given = parse_settings(settings or [])
    with starting():
        from lora_compose.compose.benchmark import bench as benchmark
    benchmark.bench(
        methods or METHODS, concepts or (1, 2, 4, 8), settings=given, steps=steps, count=count, boxes=boxes,
        memory=memory, transformers=transformers, references=references, hardware=hardware, calls=calls, time=time,
        swap=swap, loaded=loaded, growth=growth,
        model=model, device=device, dtype=dtype, size=size, savers=savers or (), pairs=pairs, peaks=peaks, to=to,
    )  # fmt: skip
