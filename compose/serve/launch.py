"""`lora-compose serve`: opens a model and a folder of LoRAs, and serves images until a signal ends it."""

from pathlib import Path

import uvicorn

from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.engine import Engine
from lora_compose.compose.serve.requests import Limits
from lora_compose.compose.support.terminal import err, say
from lora_compose.pipelines.scene import Run, Scene


def serve(run: Run, loras: Path, host: str, port: int, *, most: int, wait: float, queue: int, limits: Limits) -> None:
    """Serves images until a signal ends it.

    Args:
        run: Its model, dtype and device.
        loras: A folder of LoRA files; requests name them by the file without its suffix.
        host: The address to listen on.
        port: The port to listen on.
        most: Images that go through the model together.
        wait: Seconds that a request waits for others of its shape.
        queue: Requests that may wait.
        limits: The most that a request may ask for.

    Raises:
        ValueError: If the model or the folder cannot be opened.
    """
    pipe = open_model(run)
    known = pipe.add_concepts(loras)
    size = size_of(pipe, Scene(prompt="-"))
    say(f"{run.model}, {len(known)} LoRAs, images of {size[0]} x {size[1]}: http://{host}:{port}/docs", to=err)
    uvicorn.run(make_app(Engine(pipe, most, wait, queue), size, limits), host=host, port=port, log_level="warning")
