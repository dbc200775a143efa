"""`lora-compose serve`: opens a model and a folder of LoRAs, and serves images until a signal ends it."""

from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.engine import Engine
from lora_compose.compose.serve.requests import Limits
from lora_compose.compose.support.terminal import echo, err
from lora_compose.pipelines.scene import Run, Scene


@dataclass(frozen=True)
class Serving:
    """Settings of a server.

    Attributes:
        host: The address to listen on.
        port: The port to listen on.
        most: Most images in a batch.
        wait: Seconds that a request waits for others of its shape.
        queue: Most requests in the queue.
        lora_memory: Bytes of LoRA files kept in memory.
        limits: The most that a request may ask for.
    """

    host: str
    port: int
    most: int
    wait: float
    queue: int
    lora_memory: int
    limits: Limits


def serve(run: Run, loras: Path, serving: Serving) -> None:
    """Serves images until a signal ends it.

    Args:
        run: Its model, dtype and device.
        loras: A folder of LoRA files; requests name them by the file without its suffix.
        serving: Its settings.

    Raises:
        ValueError: If the model or the folder cannot be opened.
    """
    pipe = open_model(run)
    pipe.concept_memory = serving.lora_memory
    known = pipe.add_concepts(loras)
    size = size_of(pipe, Scene(prompt="-"))
    where = f"http://{serving.host}:{serving.port}/docs"
    echo(f"{run.model}, {len(known)} LoRAs, images of {size[0]} x {size[1]}: {where}", to=err)
    engine = Engine(pipe, serving.most, serving.wait, serving.queue)
    uvicorn.run(make_app(engine, size, serving.limits), host=serving.host, port=serving.port, log_level="warning")
