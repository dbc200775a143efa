"""`lora-compose serve`: opens a model and a folder of LoRAs, and serves images until a signal ends it."""

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn  # pyright: ignore[reportMissingImports]

from lora_compose.compose.generate.defaults import complete
from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.connections import Bounds, bounded
from lora_compose.compose.serve.door import Access
from lora_compose.compose.serve.engine import Engine
from lora_compose.compose.serve.log import bounded_log
from lora_compose.compose.serve.requests import Limits
from lora_compose.compose.support.network import url_of
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import echo, err
from lora_compose.pipelines.scene.scene import Run, Scene

_HEADERS = 16 * 1024  # bytes
_BACKLOG = 32  # connections that are accepted at once; before older ones make room they all take file descriptors
_GRACE = 5  # seconds for answers at the end


class Server(uvicorn.Server):
    """uvicorn's server; at the end it gives up what is being made, instead of waiting for it."""

    def __init__(self, app: Any, engine: Engine, host: str, port: int, bounds: Bounds | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=bounded(bounds or Bounds()),
                ws="none",
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=_HEADERS,
                timeout_graceful_shutdown=_GRACE,
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server."""
        self._engine.end()
        await super().shutdown(sockets)


def serve(
    run: Run,
    loras: Path,
    access: Access,
    port: int,
    limits: Limits,
    *,
    lora_memory: int,
    savers: Collection[Saver] = (),
    variant: str | None = None,
    **queue: Any,
) -> None:
    """Serves images until a signal ends it.

    What the run does not name is chosen (`defaults.complete`). Requests name LoRAs of the folder by file, without
    suffix, which take at most `lora_memory` bytes; `queue` are settings of the `Engine`. Raises ValueError if the model
    or the folder cannot be opened, or the model needs reference images.
    """
    facts_of(run.model).family.check_has_references(
        False, ", and a request to the server carries none: make its images with lora-compose run --reference"
    )
    run, told = complete(run)
    if run.steps > limits.steps:
        told += f"; a request that names no steps gets {limits.steps}, the most that it may have (--steps)"
    if told:
        echo(told, to=err)
    pipe = open_model(run, savers, variant)
    pipe.concept_memory = lora_memory
    known = pipe.add_concepts(loras)
    size = size_of(pipe, Scene(prompt="-"))
    where = url_of(access.host, port)
    echo(f"{run.model}, {len(known)} LoRAs, images of {size[0]} x {size[1]}: {where}", to=err)
    engine = Engine(pipe, run=run, **queue)
    steps = min(run.steps, limits.steps)
    app = make_app(engine, size, limits, access, steps=steps, guidance_scale=run.guidance_scale)
    run_server(Server(app, engine, access.host, port), engine)


def run_server(server: Server, engine: Engine) -> None:
    """Runs a server until a signal ends it; then the process ends, even in the middle of a step."""
    with bounded_log(), suppress(KeyboardInterrupt):
        try:
            server.run()
        finally:
            if not engine.stop(0):
                # A thread inside of torch must not see the interpreter go, and how long it stays there is unknown.
                echo("ended in the middle of a step", to=err)
                os._exit(1)
