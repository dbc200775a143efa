"""The queue of a server: one thread runs the model, and takes requests of one shape together.

Requests of different concepts share a forward pass (`concepts=[[...], [...]]`). A request waits for others only as long
as `wait`, and only if there is room for them. LoRA files are read when they are first named, and stay in memory up to a
limit; the least recently used are dropped first. A call whose requests have all been given up ends after its step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.files.images import Record
from lora_compose.compose.serve.choosing import chosen, chosen_concepts
from lora_compose.compose.serve.recording import record_of
from lora_compose.compose.serve.requests import ImageRequest
from lora_compose.pipelines.scene.scene import Concept, Run

logger = logging.getLogger(__name__)


_MOST_PACES = 256  # kinds of requests whose time is remembered


class Busy(Exception):  # noqa: N818 (nothing has gone wrong)
    """A request would have to wait for too long: there is room in about so many seconds."""

    def __init__(self, reason: str, seconds: float) -> None:
        self.seconds = max(1.0, seconds)
        super().__init__(f"{reason}; try again in {self.seconds:.0f} seconds")


class _GivenUp(Exception):  # noqa: N818 (nothing has gone wrong)
    """No client waits for the images of the current call any more."""


@dataclass(frozen=True)
class Served:
    """An image that was made.

    Attributes:
        request: What it was made by, with concepts and method.
        together: Number of images in its batch; the pixels depend on it.
        reason: Why it was this method; None without concepts.
        record: How it was made, as images of the command line have it; None if the engine has no run.
    """

    image: Image.Image
    request: ImageRequest
    together: int
    reason: str | None = None
    record: Record | None = None


@dataclass(frozen=True)
class _Waiting:
    request: ImageRequest
    reason: str | None = None
    future: "Future[Served]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Facts:
    """The state of a server; `seconds_per_image` is a moving average, None before the first image."""

    alive: bool
    waiting: int
    running: int
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
        timeout: Seconds within which a request should be answered; it is refused if it would wait longer than that.
        run: Model, precision and device as they were opened, for the records of images; None makes none.
    """

    def __init__(
        self,
        pipe: Any,
        most: int = 4,
        wait: float = 0.05,
        queue: int = 64,
        timeout: float = 600.0,
        run: Run | None = None,
    ) -> None:
        self._run = run
        self._pipe, self._most, self._wait, self._queue, self.timeout = pipe, most, wait, queue, timeout
        self._waiting: deque[_Waiting] = deque()
        self._running: Sequence[_Waiting] = ()
        self._begun = 0.0
        self._changed = threading.Condition()
        self._ends = False
        self._images = self._calls = 0
        self._pace: float | None = None
        self._paces: dict[Any, float] = {}
        self._thread = threading.Thread(target=self._work, name="images", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def end(self) -> None:
        """Gives up all requests; the thread ends after the current step. Does not wait for it."""
        with self._changed:
            self._ends = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify_all()
        for waiting in left:
            waiting.future.cancel()

    def stop(self, seconds: float | None = None) -> bool:
        """Ends the thread, and waits so many seconds for it; None is as long as the current step takes."""
        self.end()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The LoRAs of the server by name."""
        return self._pipe.concepts

    @property
    def facts(self) -> Facts:
        """The state of the server."""
        with self._changed:
            waiting, running = map(_wanted, (self._waiting, self._running))
            return Facts(self._thread.is_alive(), waiting, running, self._images, self._calls, self._pace)

    def submit(self, request: ImageRequest) -> "Future[Served]":
        """Puts a request into the queue, and returns a future with its image.

        It can be cancelled until it has one: the request then leaves the queue, and a call that makes no other image
        ends after its step. Raises ValueError for a LoRA that is not there, or a size that the model does not make, and
        Busy if the queue is full, or so long that the request would not be answered in time, or at the end.
        """
        width, height = self._pipe.own_size
        self._pipe.check_sides(request.width or width, request.height or height)
        waiting = _Waiting(*chosen(self._pipe, request))
        with self._changed:
            if self._ends:
                raise Busy("the server is ending", 1.0)
            for given_up in [waiting for waiting in self._waiting if waiting.future.cancelled()]:
                self._waiting.remove(given_up)
            ahead = self._seconds_ahead()
            if len(self._waiting) >= self._queue:
                raise Busy("the queue is full", ahead)
            if ahead > self.timeout:
                reason = f"the queue is about {ahead:.0f} seconds long; at most {self.timeout:.0f}"
                raise Busy(reason, ahead - self.timeout)
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.future

    def _seconds_ahead(self) -> float:
        """An estimate of how long a new request would wait; kinds that have not been made yet count nothing."""
        running = sum(self._paces.get(waiting.request.kind, 0.0) for waiting in self._running)
        left = max(0.0, running - (time.monotonic() - self._begun))
        return left + sum(self._paces.get(waiting.request.kind, 0.0) for waiting in self._waiting)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._answer(batch)
            finally:
                with self._changed:
                    self._running = ()

    def _note_pace(self, batch: Sequence[_Waiting], *, complete: bool) -> None:
        """Remembers how long an image of this kind takes; a call that was given up says how long at least."""
        kind = batch[0].request.kind
        with self._changed:
            pace = (time.monotonic() - self._begun) / len(batch)
            before = self._paces.pop(kind, None)
            if not complete:
                self._paces[kind] = max(before or 0.0, pace)
            else:
                self._images += len(batch)
                self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace
                self._paces[kind] = pace if before is None else 0.8 * before + 0.2 * pace
            if len(self._paces) > _MOST_PACES:
                del self._paces[next(iter(self._paces))]

    def _next(self) -> list[_Waiting] | None:
        """Requests of one shape, the oldest first; None at the end. Waits a moment for more of them."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ends)
            if self._ends:
                return None
            shape, since = self._waiting[0].request.shape, self._waiting[0].since

            def alike() -> list[_Waiting]:
                return [waiting for waiting in self._waiting if waiting.request.shape == shape][: self._most]

            self._changed.wait_for(
                lambda: self._ends or len(alike()) >= self._most, max(0.0, since + self._wait - time.monotonic())
            )
            batch = alike()
            for waiting in batch:
                self._waiting.remove(waiting)
            return batch

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Makes the images of a batch; if that fails, each alone, so that one bad request does not affect others."""
        with self._changed:
            if self._ends:
                for waiting in batch:  # neither waiting nor running, so `end` did not see them
                    waiting.future.cancel()
                return
            batch = [waiting for waiting in batch if not waiting.future.cancelled()]
            self._running, self._begun = batch, time.monotonic()
        if not batch:
            return
        try:
            records = [self._record(waiting, len(batch)) for waiting in batch]
            images = self.make([waiting.request for waiting in batch])
        except _GivenUp:
            self._note_pace(batch, complete=False)
            return
        except Exception as error:  # whatever models and libraries raise
            if len(batch) > 1:
                for waiting in batch:
                    self._answer([waiting])
                return
            if not isinstance(error, ValueError):
                logger.exception("an image failed")
            if batch[0].future.set_running_or_notify_cancel():
                batch[0].future.set_exception(error)
            return
        self._note_pace(batch, complete=True)
        for waiting, image, record in zip(batch, images, records, strict=True):
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_result(Served(image, waiting.request, len(batch), waiting.reason, record))

    def _record(self, waiting: _Waiting, together: int) -> Record | None:
        """How the image of a request will be made; made before it, while its LoRA files are those that it reads."""
        return self._run and record_of(self._pipe, self._run, waiting.request, waiting.reason, together)

    def make(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """The images of requests of one shape, in one call. ValueError for anything that does not fit together."""
        self._calls += 1
        return call_pipe(self._pipe, requests, self.after_step)

    def after_step(self, pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ends the call if no client waits for its images any more; diffusers' `callback_on_step_end`."""
        if not _wanted(self._running):
            raise _GivenUp
        return {}


def _wanted(requests: Iterable[_Waiting]) -> int:
    """How many requests have not been given up."""
    return sum(not waiting.future.cancelled() for waiting in requests)


def call_pipe(
    pipe: Any, requests: Sequence[ImageRequest], after_step: Callable[..., Any] | None = None
) -> list[Image.Image]:
    """One call of a pipeline for requests of one shape; `after_step` is diffusers' `callback_on_step_end`."""
    first = requests[0]
    composed: dict[str, Any] = {}
    if first.concepts:
        composed = {
            "concepts": [[concept.concept for concept in chosen_concepts(request)] for request in requests],
            "method": first.method,
        }
    negative = [request.negative_prompt for request in requests] if first.negative_prompt else None
    return pipe(
        prompt=[request.prompt for request in requests],
        **pipe.guided(first.guidance_scale, negative),
        **pipe.sized(first.width, first.height),
        num_inference_steps=first.steps,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=[],
        **composed,
    ).images
