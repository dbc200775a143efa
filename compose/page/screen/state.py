"""State between reruns of the page: shared by all sessions (open models), and of one session (everything else)."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image
from streamlit import runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx

from lora_compose.compose.check.report import Report, check
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.page.form import Form
from lora_compose.compose.page.launch import Options
from lora_compose.compose.page.merging import Merged
from lora_compose.compose.page.open_models import Busy, ModelChoice, OpenModel, OpenModels
from lora_compose.compose.page.scores import Judge, Likeness
from lora_compose.compose.page.store import ShownLora, StartImage, Store
from lora_compose.compose.page.text import page_message
from lora_compose.compose.page.work import Division, DraftJob, Job, Result
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.scene.scene import ControlFile, IPAdapterFile, Run

logger = logging.getLogger(__name__)

# One at a time: a file may be large, and reading it may hold the interpreter lock for a moment.
_READING = threading.Lock()
_PATIENCE = 0.5  # seconds that a rerun waits for files of other sessions
FILE_PATIENCE = 30.0
"""Seconds that a file waits for those of other sessions before it is read."""
VIEW = "set.view"
"""The name of the field with the view of the result."""
MOST_WAITING = 8
"""Most presses of the button that wait for the running one."""
QUEUE = "queue"
"""The place on the screen for errors of earlier presses."""
_OUTLOOKS = 64  # kept per session
_RESULTS = 100  # kept per session

Fit = tuple[ModelChoice, str, str]
"""The model that a LoRA was matched with, what fits, and what is wrong."""


MODELS, JUDGE = OpenModels(), Judge()
"""Open models and the playground's judge, of all sessions; any session could clear Streamlit's cache of them."""


@dataclass
class Row:
    """A concept on the screen; its fields are in Streamlit's state under its number.

    Attributes:
        number: Unique in the user's session; never used again.
        lora: Its LoRA; None for a bystander, and if an image named one that is missing.
        wanted: Name of the missing LoRA.
        mask: The path of a mask that an image named as its region.
        bystander: Whether it is a subject without a LoRA.
        sha256: Digest of the file that an image was made with.
    """

    number: int
    lora: ShownLora | None
    wanted: str = ""
    mask: str | None = None
    alpha: float | None = None
    bystander: bool = False
    sha256: str = ""
    fit: Fit | None = None

    @property
    def missing(self) -> bool:
        """Whether its LoRA is missing."""
        return self.lora is None and not self.bystander


@dataclass(eq=False)
class PageSession:
    """Everything of one session: files, concepts, images and running work.

    Attributes:
        results: Finished ones, the newest first.
        divisions: How the last drafts without images divide the canvas.
        shown: Key of the image on the canvas.
        job: The running job, or the last one.
        waiting: The jobs after it, in order.
        references: Paths of the reference images.
        was_working: Whether images were being generated at the last rerun.
        problems: What went wrong, by place on the screen.
        uploads: Number of uploads so far; upload fields have it in their names, so that a new number empties them.
        unready: Whether the prompt has to be fixed first; the reason is shown there.
        closed: Whether it has ended: its browser was away for too long.
        fields: The values of its fields at the last rerun, by name.
        model_folders: Folders whose models are offered.
        defaults_told: What was chosen by default when the model was opened, and why.
        sent: The image that the browser shows on the canvas, and what it was sent for it.
    """

    store: Store
    model: OpenModel
    options: Options
    session_id: str = ""
    rows: list[Row] = field(default_factory=list, init=False)
    results: list[Result] = field(default_factory=list, init=False)
    compared: list[Result] = field(default_factory=list, init=False)
    divisions: list[Division] = field(default_factory=list, init=False)
    shown: str = field(default="", init=False)
    job: Job | None = field(default=None, init=False)
    waiting: list[Job] = field(default_factory=list, init=False)
    was_working: bool = field(default=False, init=False)
    problems: dict[str, list[str]] = field(default_factory=dict, init=False)
    uploads: int = field(default=0, init=False)
    start: StartImage | None = field(default=None, init=False)
    references: list[str] = field(default_factory=list, init=False)
    guides: list[ControlFile | IPAdapterFile] = field(default_factory=list, init=False)
    unready: bool = field(default=False, init=False)
    closed: bool = field(default=False, init=False)
    merged: Merged | None = field(default=None, init=False)
    fields: dict[str, Any] = field(default_factory=dict, init=False)
    model_folders: list[Path] = field(default_factory=list, init=False)
    defaults_told: str = field(default="", init=False)
    sent: tuple[Image.Image | None, str | None] = field(default=(None, None), init=False)
    _numbers: int = field(default=0, init=False)
    _png: tuple[str, bytes] = field(default=("", b""), init=False)
    _outlooks: dict[str, Report] = field(default_factory=dict, init=False)
    _likeness: dict[str, dict[str, Likeness]] = field(default_factory=dict, init=False)

    @property
    def working(self) -> bool:
        """Whether images are being generated for the user's session."""
        return self.job is not None and self.job.running

    @property
    def result(self) -> Result | None:
        """The image on the canvas."""
        return next((result for result in self.results if result.key == self.shown), None)

    def new_row(
        self,
        lora: ShownLora | None,
        wanted: str = "",
        mask: str | None = None,
        alpha: float | None = None,
        *,
        bystander: bool = False,
    ) -> Row:
        """Adds a concept."""
        self._numbers += 1
        self.rows.append(Row(self._numbers, lora, wanted, mask, alpha, bystander))
        return self.rows[-1]

    def begin(self, runs: list[Run], flops: list[int | None], *, comparing: bool, record_attention: bool) -> None:
        """Starts to generate images, or queues them; they stop when the session ends."""
        self._begin(Job(self.model, runs, record_attention=record_attention, flops=flops, comparing=comparing))

    def try_noises(self, runs: list[Run]) -> None:
        """Starts to draft images, or queues the drafts behind the running work."""
        self._begin(DraftJob(self.model, runs))

    def _begin(self, job: Job) -> None:
        self.collect()  # of a job that ended since the page was last drawn
        if self.working:
            if len(self.waiting) < MOST_WAITING:  # buttons may be pressed again before the page is drawn anew
                self.waiting.append(job)
            return
        self.problems[QUEUE] = []
        self.job = job
        if self.closed:
            self.job.stop()  # the session has ended in this moment
        self.job.start()

    def goes_on_in(self, session_id: str) -> None:
        """Goes on in another session of Streamlit, as after a reload."""
        self.session_id = session_id

    def close(self) -> bool:
        """Stops the work and deletes everything; True once nothing is left."""
        self.closed = True
        self.waiting = []
        if self.job is not None:
            self.job.stop()
            self.job = self.job if self.job.running else None
        self.rows, self.results, self.compared, self.divisions = [], [], [], []
        self._png, self.sent, self.merged = ("", b""), (None, None), None
        _forget(self.session_id)
        return self.store.close() and self.job is None

    def png(self, result: Result) -> bytes:
        """The image on the canvas as a PNG with its record."""
        if self._png[0] != result.key:
            self._png = result.key, png_bytes(result.made.image, result.made.record)
        return self._png[1]

    def collect(self) -> bool:
        """Takes over what the job has finished, and starts the next one; True if there was something new."""
        job, known = self.job, {result.key for result in (*self.results, *self.compared)}
        if job is None:
            return False
        running = job.running  # read before its images, so that none is missed
        new = [result for result in job.results if result.key not in known]
        drafted = isinstance(job, DraftJob) and self.divisions != job.divisions
        if isinstance(job, DraftJob):
            self.divisions = list(job.divisions)
        if new and job.comparing:
            self.compared = list(job.results)
        self.results = [*reversed(new), *self.results][:_RESULTS]
        if new and not job.comparing:
            self.shown = new[0].key
        if not running and self.waiting:
            if job.state == "failed":
                self.problems.setdefault(QUEUE, []).append(job.error)
            self.job = self.waiting.pop(0).start()
        return bool(new) or drafted

    def outlook(self, form: Form) -> Report | None:
        """The check of a form; None while the model is in use."""
        run = form.runs()[0].model_copy(update={"seed": 0})
        key = f"{form.choice} {run.model_dump_json()}"
        if key not in self._outlooks:
            try:
                with self.model.turn(run.scene.concepts, wait=False) as pipe:
                    self._outlooks[key] = check(run, pipe, known_costs=self.model.costs)
            except Busy:
                return None
            except Exception as error:  # whatever a method raises, the page goes on, and the image may be tried
                logger.exception("a run could not be checked")
                return Report((), (f"This could not be checked: {error}",), ())  # not kept: it may pass next time
            for old in list(self._outlooks)[:-_OUTLOOKS]:
                del self._outlooks[old]
        return self._outlooks[key]

    def look_at(self, result: Result) -> None:
        """Shows an image on the canvas."""
        self.shown, st.session_state[VIEW] = result.key, "Image"

    def fit(self, row: Row) -> Fit | None:
        """Whether a concept's LoRA fits the model; None while files of other sessions are being read."""
        if row.lora is not None and (row.fit is None or row.fit[0] != self.model.choice):
            try:
                row.fit = self.model.choice, *_fit(self.model, row.lora, row.alpha)
            except Busy:
                return None
        return row.fit

    def likeness(self, result: Result) -> dict[str, Likeness]:
        """The judge's scores of an image, computed once."""
        if result.key not in self._likeness:
            self._likeness[result.key] = JUDGE.score(result.made.image, result.run)
        return self._likeness[result.key]


@contextmanager
def reading(patience: float) -> Iterator[None]:
    """One file at a time, for all sessions; raises Busy after `patience` seconds of waiting for others."""
    if not _READING.acquire(timeout=patience):
        raise Busy
    try:
        yield
    finally:
        _READING.release()


def discard(files: Iterable[Any]) -> None:
    """Removes uploaded files from Streamlit's memory, where they would otherwise stay until the session ends."""
    context = get_script_run_ctx()
    for file in files:
        if context is not None and isinstance(context.uploaded_file_mgr, MemoryUploadedFileManager):
            context.uploaded_file_mgr.remove_file(session_id=context.session_id, file_id=file.file_id)


def _forget(session_id: str) -> None:
    """Removes a session's uploads and images from Streamlit's memory, which may keep them for much longer."""
    if runtime.exists():
        server = runtime.get_instance()
        server.uploaded_file_mgr.remove_session_files(session_id)
        server.media_file_mgr.clear_session_refs(session_id)
        server.media_file_mgr.remove_orphaned_files()


def _fit(model: OpenModel, lora: ShownLora, alpha: float | None) -> tuple[str, str]:
    concept = lora.concept("it").model_copy(update={"lora": lora_source(lora.source), "alpha": alpha})
    with reading(_PATIENCE):
        try:
            return model.read(concept).report, ""
        except (LoraError, OSError) as error:
            return "", _unfit(model, lora, error)
        except Exception as error:  # files are not trusted: whatever errors they cause, the page goes on
            logger.exception("a LoRA could not be looked at")
            return "", f"{lora.shown} cannot be used ({type(error).__name__})."


def _unfit(model: OpenModel, lora: ShownLora, error: Exception) -> str:
    """Why a LoRA cannot be used, and what to do."""
    if lora.family is None or lora.family == model.family:
        return page_message(str(error), files={lora.source: lora.shown, Path(lora.source).name: lora.shown})
    made = f"{lora.shown} was made for {lora.family}, but the model {model.choice.model} is open."
    if not lora.composed:
        return f"{made} This page composes other families. Remove this concept."
    return f"{made} Open such a model with “Model” at the top, or remove this concept."
