"""The queue of a server: one thread runs the model, and takes requests of one shape together.

Requests of different concepts share a forward pass (`concepts=[[...], [...]]`). A request waits for others only as long
as `wait`, and only if there is room for them. LoRA files are read when they are first named, and stay in memory up to a
limit; the least recently used are dropped first.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.serve.requests import ImageRequest
from lora_compose.pipelines.scene import Concept

logger = logging.getLogger(__name__)


class Busy(Exception):  # noqa: N818 (nothing has gone wrong)
    """There is no room in the queue.

    Attributes:
        seconds: Estimated seconds until there is room.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {seconds:.0f} seconds")
        self.seconds = seconds


@dataclass(frozen=True)
class Served:
    """An image that was made.

    Attributes:
        image: The image.
        together: Number of images in its batch; the pixels depend on it.
    """

    image: Image.Image
    together: int


@dataclass(frozen=True)
class _Waiting:
    request: ImageRequest
    future: "Future[Served]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Facts:
    """The state of a server.

    Attributes:
        alive: Whether its thread runs.
        waiting: Requests in the queue.
        images: Images made so far.
        calls: Calls of the model so far.
        seconds_per_image: A moving average; None before the first one.
    """

    alive: bool
    waiting: int
    images: int
    calls: int
    seconds_per_image: float | None


class Engine:
    """Makes the images of requests; those of one shape are batched.

    Args:
        pipe: An opened pipeline that knows its concepts; only this engine may use it.
        most: Most images in a batch.
        wait: Seconds that a request waits for others of its shape.
        queue: Most requests in the queue; further ones are refused.
    """

    def __init__(self, pipe: Any, most: int = 4, wait: float = 0.05, queue: int = 64) -> None:
        self._pipe, self._most, self._wait, self._queue = pipe, most, wait, queue
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._images = self._calls = 0
        self._pace: float | None = None
        self._thread = threading.Thread(target=self._work, name="images", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current call; waiting requests are dropped."""
        with self._changed:
            self._ends = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for one in left:
            one.future.cancel()
        self._thread.join()

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """Its LoRAs by name."""
        return self._pipe.concepts

    @property
    def facts(self) -> Facts:
        """Its state."""
        with self._changed:
            return Facts(self._thread.is_alive(), len(self._waiting), self._images, self._calls, self._pace)

    def submit(self, request: ImageRequest) -> "Future[Served]":
        """Puts a request into the queue.

        Returns:
            A future with its image. A request whose future is cancelled is not made.

        Raises:
            ValueError: If it names a LoRA that is not there.
            Busy: If the queue is full.
        """
        known = self.concepts
        if lost := [one.name for one in request.concepts if one.name not in known]:
            raise ValueError(f"there is no LoRA {lost[0]!r}; GET /loras lists those that there are")
        waiting = _Waiting(request)
        with self._changed:
            for given_up in [one for one in self._waiting if one.future.cancelled()]:
                self._waiting.remove(given_up)
            if len(self._waiting) >= self._queue:
                raise Busy(max(1.0, (self._pace or 1.0) * len(self._waiting)))
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.future

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            taken = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if taken:
                start = time.monotonic()
                self._answer(taken)
                pace = (time.monotonic() - start) / len(taken)
                with self._changed:
                    self._images += len(taken)
                    self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace

    def _next(self) -> list[_Waiting] | None:
        """Requests of one shape, the oldest first; None at the end. Waits a moment for more of them."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ends)
            if self._ends:
                return None
            shape, since = self._waiting[0].request.shape, self._waiting[0].since

            def alike() -> list[_Waiting]:
                return [one for one in self._waiting if one.request.shape == shape][: self._most]

            self._changed.wait_for(
                lambda: self._ends or len(alike()) >= self._most, max(0.0, since + self._wait - time.monotonic())
            )
            batch = alike()
            for one in batch:
                self._waiting.remove(one)
            return batch

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Makes the images of a batch; if that fails, each alone, so that one bad request does not affect others."""
        try:
            images = self.make([one.request for one in batch])
        except Exception as error:  # whatever models and libraries raise
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
                return
            if not isinstance(error, ValueError):
                logger.exception("an image failed")
            batch[0].future.set_exception(error)
            return
        for one, image in zip(batch, images, strict=True):
            one.future.set_result(Served(image, len(batch)))

    def make(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """The images of requests of one shape, in one call of the pipeline.

        Raises:
            ValueError: For anything that does not fit together.
        """
        self._calls += 1
        return call_pipe(self._pipe, requests)


def call_pipe(pipe: Any, requests: Sequence[ImageRequest]) -> list[Image.Image]:
    """One call of a pipeline for requests of one shape."""
    first = requests[0]
    composed: dict[str, Any] = {}
    if first.concepts:
        composed = {
            "concepts": [[one.concept for one in request.concepts] for request in requests],
            "method": first.method,
        }
    return pipe(
        [request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests] if first.guidance_scale > 1 else None,
        width=first.width,
        height=first.height,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        **composed,
    ).images
