"""The web interface of a server: POST /images, GET /loras, GET /health.

A full queue answers 503 with Retry-After, an invalid request 422. A client that disconnects leaves the queue.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import psutil
from fastapi import FastAPI, HTTPException, Request, Response  # pyright: ignore[reportMissingImports]

from lora_compose.compose.serve.engine import Busy, Engine, Served
from lora_compose.compose.serve.requests import ImageRequest, Limits

_LOOK = 0.25  # seconds between checks whether a client is still connected


def make_app(engine: Engine, size: tuple[int, int], limits: Limits | None = None) -> FastAPI:
    """The application of a server.

    Args:
        engine: Makes the images; it is started and stopped with the application.
        size: Width and height of images by default.
        limits: The most that a request may ask for.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="lora-compose", lifespan=lifespan)

    @app.post("/images", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def images(given: ImageRequest, request: Request) -> Response:
        """One image, as PNG."""
        wanted = given.resolved(*size)
        _check(wanted, limits)
        try:
            future = engine.submit(wanted)
        except Busy as error:
            headers = {"Retry-After": str(math.ceil(error.seconds))}
            raise HTTPException(503, str(error), headers=headers) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        served = await _result(asyncio.wrap_future(future), request)
        buffer = BytesIO()
        await asyncio.to_thread(served.image.save, buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png", headers={"X-Images-Together": str(served.together)})

    @app.get("/loras")
    async def loras() -> dict[str, dict[str, str | None]]:
        """All LoRAs by name, with trigger and class word."""
        return {
            name: {"trigger": concept.trigger, "class_word": concept.class_word}
            for name, concept in engine.concepts.items()
        }

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        """The state of the server; 503 if its thread has ended."""
        facts = engine.facts
        response.status_code = 200 if facts.alive else 503
        return {**vars(facts), "memory_bytes": psutil.Process().memory_info().rss}

    return app


def _check(request: ImageRequest, limits: Limits) -> None:
    pixels = (request.width or 0) * (request.height or 0)
    if pixels > limits.pixels:
        raise HTTPException(422, f"{request.width} x {request.height} is too large; at most {limits.pixels} pixels")
    if request.steps > limits.steps:
        raise HTTPException(422, f"{request.steps} steps are too many; at most {limits.steps}")


async def _result(future: "asyncio.Future[Served]", request: Request) -> Served:
    """The image, unless the client goes away, which takes its request out of the queue."""
    while not future.done():
        await asyncio.wait([future], timeout=_LOOK)
        if not future.done() and await request.is_disconnected():
            future.cancel()
            raise HTTPException(499, "the client is gone")
    try:
        return future.result()
    except asyncio.CancelledError as error:
        raise HTTPException(503, "the server is ending") from error
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    except Exception as error:
        raise HTTPException(500, "the image could not be made; the log of the server says why") from error
