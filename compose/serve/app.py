"""The web interface of a server: POST /images, GET /loras, GET /health.

Too long a queue answers 503 with Retry-After, an invalid request 422. A client that disconnects leaves the queue, or
ends the call that makes its image. `Door` answers what never comes here.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
from fastapi import FastAPI, HTTPException, Request, Response  # pyright: ignore[reportMissingImports]
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]

from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.serve.door import Access, Door
from lora_compose.compose.serve.engine import Busy, Engine, Served
from lora_compose.compose.serve.requests import ImageRequest, Limits, reasons, short

_LOOK = 0.25  # seconds between checks whether a client is still connected
_STOPPING = 5.0  # seconds that the end waits for the current step


def make_app(
    engine: Engine,
    size: tuple[int, int],
    limits: Limits | None = None,
    access: Access | None = None,
    *,
    steps: int,
    guidance_scale: float,
) -> FastAPI:
    """The application of a server; the engine starts and stops with it. Access of None is this machine.

    `size`, `steps` and `guidance_scale` are for requests that name none.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, _STOPPING)

    # No pages of documentation: they load scripts from another server. /openapi.json has all fields.
    app = FastAPI(title="lora-compose", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, access=access or Access())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": reasons(error.errors())}, 422)

    @app.post("/images", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def images(given: ImageRequest, request: Request) -> Response:
        """One image, as PNG."""
        wanted = given.resolved(*size, steps, guidance_scale)
        _check(wanted, limits)
        try:
            future = await asyncio.to_thread(engine.submit, wanted)  # "auto" compares the prompt with all LoRAs
        except Busy as error:
            headers = {"Retry-After": str(math.ceil(error.seconds))}
            raise HTTPException(503, str(error), headers=headers) from error
        except ValueError as error:
            raise HTTPException(422, short(str(error))) from error
        served = await _result(asyncio.wrap_future(future), request, engine.timeout)
        data = await asyncio.to_thread(png_bytes, served.image, served.record, absolute=False)
        headers = {"X-Images-Together": str(served.together)}
        if served.reason is not None:
            reason = short(served.reason).encode("ascii", "backslashreplace").decode()
            headers |= {"X-Method": served.request.method or "", "X-Method-Reason": reason}
        return Response(data, media_type="image/png", headers=headers)

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
    if (request.steps or 0) > limits.steps:
        raise HTTPException(422, f"{request.steps} steps are too many; at most {limits.steps}")


async def _result(future: "asyncio.Future[Served]", request: Request, timeout: float) -> Served:
    """The image, unless the client goes away or the time is over, which gives the request up."""
    until = time.monotonic() + timeout
    while not future.done():
        await asyncio.wait([future], timeout=min(_LOOK, max(0.0, until - time.monotonic())))
        if future.done():
            break
        if await request.is_disconnected():
            future.cancel()
            raise HTTPException(499, "the client is gone")
        if time.monotonic() >= until:
            future.cancel()
            reason = f"there was no image after {timeout:g} seconds; try again later, or with fewer pixels or steps"
            raise HTTPException(503, reason, headers={"Retry-After": str(math.ceil(timeout))})
    try:
        return future.result()
    except asyncio.CancelledError as error:
        raise HTTPException(503, "the server is ending", headers={"Retry-After": "10"}) from error
    except ValueError as error:
        raise HTTPException(422, short(str(error))) from error
    except Exception as error:
        raise HTTPException(500, "the image could not be made; the log of the server says why") from error
