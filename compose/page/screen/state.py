"""What is kept between two looks at the screen: by everybody (open models), and by one visit (everything else)."""

import logging
import threading
import weakref
from dataclasses import dataclass, field

import streamlit as st

from compose.check import Report, check
from compose.page.draft import Draft, example
from compose.page.launch import Options, options
from compose.page.quick import Quick
from compose.page.scores import Judge, Likeness
from compose.page.shelf import Busy, Choice, Shelf, Slot
from compose.page.store import Lora, Store
from compose.page.work import Job, Picture
from pipelines.loading import LoraError
from pipelines.scene import Concept, Run

logger = logging.getLogger(__name__)

_CHECKING = threading.Lock()  # checks listen to the log, whose level is everybody's
_OUTLOOKS = 64  # kept per visit
_PICTURES = 100  # kept per visit

Fit = tuple[Choice, str, str]
"""For which model a LoRA was looked at, what fits, and what is wrong."""


@st.cache_resource(show_spinner=False)
def shelf() -> Shelf:
    """The open models, shared by everybody."""
    return Shelf()


@st.cache_resource(show_spinner=False)
def judge() -> Judge:
    """The playground's judge, shared by everybody."""
    return Judge()


@st.cache_resource(show_spinner=False)
def quick() -> Quick:
    """The quick suite, shared by everybody."""
    return Quick(options().evaluations)


@dataclass
class Row:
    """A concept on the screen; its fields are in Streamlit's state under its number.

    Attributes:
        number: Of this visit; never used again.
        lora: Its LoRA; None if a picture named one that is not here.
        wanted: What it was called, if it is not here.
        mask: The path of a mask that a picture named as its region.
        fit: What came of looking at the LoRA with the model.
    """

    number: int
    lora: Lora | None
    wanted: str = ""
    mask: str | None = None
    fit: Fit | None = None


@dataclass(eq=False)
class Visit:
    """All that one visitor has: files, concepts, pictures and the work in hand.

    Attributes:
        store: Files.
        slot: The model.
        options: How the page was started.
        rows: The concepts.
        pictures: Finished ones, the newest first.
        compared: Finished pictures of the comparison.
        shown: Key of the picture that is looked at.
        job: What is being made, or was last.
        comparing: Whether that is a comparison.
        troubles: What went wrong, by place on the screen.
        uploads: How many times something was uploaded, which gives upload fields new names, and so empties them.
    """

    store: Store
    slot: Slot
    options: Options
    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    compared: list[Picture] = field(default_factory=list)
    shown: str = ""
    job: Job | None = None
    comparing: bool = False
    troubles: dict[str, list[str]] = field(default_factory=dict)
    uploads: int = 0
    _numbers: int = 0
    _ending: weakref.finalize | None = None
    _outlooks: dict[str, Report] = field(default_factory=dict)
    _likeness: dict[str, dict[str, Likeness]] = field(default_factory=dict)

    @property
    def working(self) -> bool:
        """Whether pictures are being made for this visit."""
        return self.job is not None and self.job.running

    @property
    def picture(self) -> Picture | None:
        """The picture that is looked at."""
        return next((picture for picture in self.pictures if picture.key == self.shown), None)

    def new_row(self, lora: Lora | None, wanted: str = "", mask: str | None = None) -> Row:
        """Adds a concept."""
        self._numbers += 1
        self.rows.append(Row(self._numbers, lora, wanted, mask))
        return self.rows[-1]

    def begin(self, runs: list[Run], *, comparing: bool, record_attention: bool) -> None:
        """Starts to make pictures; they go on while the page is looked at, and stop when nobody has it open."""
        self.comparing = comparing
        self.job = Job(self.slot, runs, record_attention=record_attention).start()
        if self._ending is not None:
            self._ending.detach()
        self._ending = weakref.finalize(self, self.job.stop)

    def collect(self) -> bool:
        """Takes over what the job has finished; True if there was something new."""
        job, known = self.job, {picture.key for picture in (*self.pictures, *self.compared)}
        new = [picture for picture in job.pictures if picture.key not in known] if job is not None else []
        if self.comparing:
            self.compared += new
        self.pictures = [*reversed(new), *self.pictures][:_PICTURES]
        if new and not self.comparing:
            self.shown = new[0].key
        return bool(new)

    def outlook(self, draft: Draft) -> Report | None:
        """What a draft would do; None while others have the model."""
        run = draft.runs()[0].model_copy(update={"seed": 0})
        key = f"{draft.choice} {run.model_dump_json()}"
        if key not in self._outlooks:
            try:
                with _CHECKING, self.slot.turn(run.scene.concepts, wait=False) as pipe:
                    self._outlooks[key] = check(run, pipe)
            except Busy:
                return None
            except Exception as error:  # whatever a method raises: the page lives on, and the picture may be tried
                logger.exception("a run could not be checked")
                self._outlooks[key] = Report((), (f"This could not be checked: {error}",), ())
            for old in list(self._outlooks)[:-_OUTLOOKS]:
                del self._outlooks[old]
        return self._outlooks[key]

    def fit(self, row: Row) -> Fit | None:
        """Whether a concept's LoRA fits the model; None while others have the model."""
        if row.lora is not None and (row.fit is None or row.fit[0] != self.slot.choice):
            try:
                row.fit = self.slot.choice, *_fit(self.slot, row.lora)
            except Busy:
                return None
        return row.fit

    def likeness(self, picture: Picture) -> dict[str, Likeness]:
        """What the judge says of a picture, looked at once."""
        if picture.key not in self._likeness:
            self._likeness[picture.key] = judge().score(picture.made.image, picture.run.scene)
        return self._likeness[picture.key]


def visit() -> Visit:
    """This visit; a new one begins with the example."""
    from compose.page.screen import fields

    if "visit" not in st.session_state:
        draft = example()
        new = Visit(Store(), shelf().open(draft.choice), options())
        st.session_state["visit"] = new
        fields.fill(new, draft, {concept.name: _known(concept) for concept in draft.concepts})
    return st.session_state["visit"]


def choose_model(here: Visit, choice: Choice) -> None:
    """Opens another model for this visit.

    Raises:
        ValueError: If it cannot be opened; the visit keeps its model then.
    """
    here.slot = shelf().open(choice)


def _known(concept: Concept) -> Lora:
    from compose.page.store import named

    return named(concept.lora or "")


def _fit(slot: Slot, lora: Lora) -> tuple[str, str]:
    concept = lora.concept("it")
    with slot.turn((), wait=False) as pipe:
        try:
            from compose.models import lora_source

            found = pipe.resolve_concepts([concept.model_copy(update={"lora": lora_source(lora.source)})])[0]
        except (LoraError, OSError) as error:
            return "", str(error)
    return found.factors.report, ""
