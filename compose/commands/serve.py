"""`lora-compose serve`: a server of images over HTTP."""

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands import options
from lora_compose.compose.commands.asked import check_folder, run_of
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.serve.door import Access
from lora_compose.compose.serve.requests import Limits
from lora_compose.compose.support.network import is_local
from lora_compose.compose.support.packages import SERVE, check_packages
from lora_compose.compose.support.terminal import handle_errors, starting
from lora_compose.pipelines.scene.scene import Scene
from lora_compose.pipelines.support.quantising import check_quantize


@handle_errors(logging.WARNING)
def serve(
    model: options.ModelArgument,
    loras: Annotated[Path, typer.Option(help="Folder of LoRA files; requests name them without .safetensors.")],
    host: Annotated[str, typer.Option(help="Address to listen on; all but localhost needs a token.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8500,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_COMPOSE_TOKEN",
            help="What requests must carry, as the header Authorization: Bearer TOKEN. Other users of the machine can "
            "read command lines; the environment variable is private.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that clients call the server by, such as gpu.example.org. May be repeated."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=64, help="Most requests of equal size and steps in one batch.")
    ] = 4,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for further requests of a batch.")] = 0.05,
    queue: Annotated[int, typer.Option(min=1, max=500, help="Most requests in the queue; further ones get 503.")] = 64,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds within which a request is answered; 503 if that is not possible.")
    ] = 600.0,
    lora_memory: Annotated[
        float, typer.Option(min=0, help="GiB of LoRA files kept in memory; the least recently used are dropped.")
    ] = 2.0,
    pixels: Annotated[int, typer.Option(min=1, help="Largest image, width times height.")] = 1024 * 1024,
    steps: Annotated[int, typer.Option(min=1, help="Most denoising steps of a request.")] = 50,
    dtype: options.DtypeOption = None,
    quantize: options.QuantizeOption = None,
    variant: options.VariantOption = None,
    device: options.DeviceOption = None,
    savers: options.SaversOption = None,
) -> None:
    """Serve images over HTTP: one model, many LoRAs, in batches."""
    asked = run_of(scene=Scene(prompt="-"), model=model, dtype=dtype, quantize=quantize, device=device)
    model_source(model)
    check_quantize(quantize)
    check_folder(loras)
    if token is None and not is_local(host):
        raise ValueError(
            f"{host!r} lets others in, so a token is needed: LORA_COMPOSE_TOKEN=$(openssl rand -hex 16) lora-compose "
            "serve ..."
        )
    if token is not None and not re.fullmatch(r"[!-~]{16,200}", token):
        raise ValueError("a token has 16 to 200 letters, digits and signs, without spaces: openssl rand -hex 16")
    check_packages("the server", SERVE, "serve")
    with starting():
        from lora_compose.compose.serve.launch import serve as start
    start(
        asked, loras, Access(host, tuple(allowed_host or ()), token), port, Limits(pixels=pixels, steps=steps),
        lora_memory=round(lora_memory * 2**30), savers=savers or (), variant=variant, most=batch_size, wait=wait,
        queue=queue, timeout=timeout,
    )  # fmt: skip
