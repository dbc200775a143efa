"""`lora-compose serve`: a server of images over HTTP."""

import importlib.util
import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.options import run_of
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.serve.requests import Limits
from lora_compose.compose.support.names import file_near
from lora_compose.compose.support.terminal import handle_errors, starting
from lora_compose.pipelines.scene import Scene


@handle_errors(logging.WARNING)
def serve(
    model: Annotated[str, typer.Argument(help="playground, a folder, a .safetensors file, or a hub repository.")],
    loras: Annotated[Path, typer.Option(help="Folder of LoRA files; requests name them without .safetensors.")],
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no password: anybody who can reach the address can use it."),
    ] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8500,
    batch_size: Annotated[
        int, typer.Option(min=1, max=64, help="Most requests of equal size and steps in one batch.")
    ] = 4,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for further requests of a batch.")] = 0.05,
    queue: Annotated[int, typer.Option(min=1, help="Most requests in the queue; further ones get 503.")] = 64,
    lora_memory: Annotated[
        float, typer.Option(min=0, help="GiB of LoRA files kept in memory; the least recently used are dropped.")
    ] = 2.0,
    pixels: Annotated[int, typer.Option(min=1, help="Largest image, width times height.")] = 1024 * 1024,
    steps: Annotated[int, typer.Option(min=1, help="Most denoising steps of a request.")] = 50,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the fastest.")] = None,
) -> None:
    """Serve images over HTTP: one model, many LoRAs, in batches."""
    asked = run_of(scene=Scene(prompt="-"), model=model, dtype=dtype, device=device)
    model_source(model)
    if not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}{file_near(loras)}; --loras names a folder of LoRAs")
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {' and '.join(missing)}: pip install 'lora-compose[serve]'")
    with starting():
        from lora_compose.compose.serve.launch import Serving
        from lora_compose.compose.serve.launch import serve as start
    limits = Limits(pixels=pixels, steps=steps)
    start(asked, loras, Serving(host, port, batch_size, wait, queue, round(lora_memory * 2**30), limits))
