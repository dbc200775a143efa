"""Generates images in a thread of its own, with a preview and a stop."""

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_compose.attention.backbones.joint import PATCH
from lora_compose.compose.figures.overlay import Attention, division
from lora_compose.compose.generate.making import Made, draft, make_batch, size_of
from lora_compose.compose.page.open_models import OpenModel, Stopped
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.scene.scene import Run

logger = logging.getLogger(__name__)

State = Literal["waiting", "working", "done", "stopped", "failed"]

_PREVIEW_CELLS = 32  # longer side of the latents that a preview is decoded from
_PREVIEW_SHARE = 0.1  # fraction of the time that previews may take


@dataclass(frozen=True, eq=False)
class Result:
    """A finished image; its cost is None without concepts."""

    made: Made
    cost: Cost | None
    attention: Attention | None
    seconds: float
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def run(self) -> Run:
        """How it was made."""
        return self.made.record.run

    @cached_property
    def jpeg(self) -> bytes:
        """The image as Streamlit would send it, which would encode it again each time that the page is drawn."""
        buffer = BytesIO()
        self.made.image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class Division:
    """How the noise of a run divides the canvas between its subjects, as an image in the colours of the concepts."""

    run: Run
    image: Image.Image


class Job:
    """Images to be generated one after the other, each by `lora_compose.compose.generate.make`.

    Args:
        flops: FLOPs of each, if known.

    Attributes:
        ahead: While waiting, the number of calls ahead.
    """

    def __init__(
        self,
        model: OpenModel,
        runs: Sequence[Run],
        *,
        record_attention: bool,
        flops: Sequence[int | None] = (),
        comparing: bool = False,
    ) -> None:
        self.model = model
        self.comparing = comparing
        self.runs = tuple(runs)
        self.state: State = "waiting"
        self.ahead = 0
        self.results: list[Result] = []
        self.preview: Image.Image | None = None
        self.error = ""
        self._record_attention = record_attention
        self._flops = flops or [None] * len(runs)
        self._stop = threading.Event()
        self._done, self._of = 0, self.runs[0].steps if self.runs else 0
        self._first_step: float | None = None
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._work, name="lora-compose-page", daemon=True)

    def start(self) -> "Job":
        """Starts the thread; does not wait."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the job after the current denoising step."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the job has ended."""
        self._thread.join(timeout)

    @property
    def running(self) -> bool:
        """Whether the job still waits or works."""
        return self.state in ("waiting", "working")

    @property
    def stopping(self) -> bool:
        """Whether stop was pressed, and the current step is not over yet."""
        return self.running and self._stop.is_set()

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of the current image that are done, and of how many."""
        return self._done, self._of

    @property
    def made(self) -> int:
        """How many are finished."""
        return len(self.results)

    @property
    def share(self) -> float:
        """The finished fraction of all images, up to 1."""
        within = self._done / self._of if self._of else 0.0
        return min(1.0, (self.made + within) / max(1, len(self.runs)))

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left, from the steps so far; None before the first one."""
        share = self.share
        if self._first_step is None or share <= 0:
            return None
        return (time.monotonic() - self._first_step) * (1 - share) / share

    def _work(self) -> None:
        try:
            concepts = [concept for run in self.runs for concept in run.scene.concepts]
            with self.model.turn(concepts, stop=self._stop, on_wait=partial(setattr, self, "ahead")) as pipe:
                self.state = "working"
                for run, flops in zip(self.runs, self._flops, strict=True):
                    self._make(pipe, run)
                    if flops is not None:
                        self.model.seconds_per_flop = self.results[-1].seconds / flops
            self.state = "done"
        except Stopped:
            self.state = "stopped"
        except (ValueError, OSError) as error:
            self._fail(str(error))
        except torch.OutOfMemoryError as error:
            logger.warning("out of memory: %s", error)
            self._fail("Out of memory. Choose a smaller canvas, float16, or “Save memory”.")
        except Exception as error:  # whatever models and libraries raise, the page goes on
            logger.exception("an image could not be made")
            self._fail(f"Internal error ({type(error).__name__}): {str(error)[:300]}")
        finally:
            self.preview = None

    def _fail(self, message: str) -> None:
        self.error, self.state = message, "failed"

    def _make(self, pipe: Any, run: Run) -> None:
        if self._stop.is_set():
            raise Stopped
        self._done, self._of = 0, run.steps
        start = time.monotonic()
        self._first_step = self._first_step or start
        made = make_batch(
            pipe,
            run,
            (run.seed,),
            on_step=lambda done, of, latents: self._step(pipe, run, done, of, latents),
            record_attention=self._record_attention,
        )
        self.results.append(Result(made.images[0], made.cost, made.attention, time.monotonic() - start))
        self._done, self.preview = 0, made.images[0].image  # until the next one can be looked at

    def _step(self, pipe: Any, run: Run, done: int, of: int, latents: Tensor) -> None:
        if self._stop.is_set():
            raise Stopped
        self._done, self._of = done, of
        # With offloading, a look would move the models to and fro.
        if not self.model.choice.offloads and done < of and time.monotonic() >= self._next_look:
            start = time.monotonic()
            self.preview = look(pipe, latents, size_of(pipe, run.scene))
            took = time.monotonic() - start
            self._next_look = time.monotonic() + took / _PREVIEW_SHARE


class DraftJob(Job):
    """Drafts without their images, one for each run; `divisions` are the finished ones."""

    def __init__(self, model: OpenModel, runs: Sequence[Run]) -> None:
        super().__init__(model, runs, record_attention=False)
        self.divisions: list[Division] = []

    @property
    def made(self) -> int:
        """How many are finished."""
        return len(self.divisions)

    def _make(self, pipe: Any, run: Run) -> None:
        if self._stop.is_set():
            raise Stopped
        self._first_step = self._first_step or time.monotonic()
        subjects = [i for i, concept in enumerate(run.scene.concepts) if not concept.is_style]
        drafted = draft(pipe, run)
        shown = division(size_of(pipe, run.scene), drafted.maps, drafted.masks, subjects)
        self.divisions.append(Division(run, shown))


def look(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Image.Image:
    """A preview of latents, as callbacks have them, for an image of this size; the VAE gets large ones shrunk."""
    cells = pipe.cells_of(latents[:1], size)
    longer = max(cells.shape[-2:])
    if longer > _PREVIEW_CELLS:
        sides = [max(PATCH, round(side * _PREVIEW_CELLS / longer / PATCH) * PATCH) for side in cells.shape[-2:]]
        cells = F.interpolate(cells, sides, mode="area")
    with torch.no_grad():
        return pipe.image_processor.postprocess(pipe.pixels_of(cells), output_type="pil")[0]
