"""The concepts that a pipeline knows: loaded from files, added by name, or adapters of `load_lora_weights`."""

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

from lora_compose.pipelines.concepts.concept_set import NO_LORA, LoadedConcept
from lora_compose.pipelines.concepts.finding import find_file, local_path
from lora_compose.pipelines.concepts.loading import Factors, LoraError, adapter_factors, match, read_lora
from lora_compose.pipelines.concepts.lru import Read, Recent, file_key
from lora_compose.pipelines.concepts.merged import merge_matched, merger_for, without_tensors
from lora_compose.pipelines.formats.alphas import needed_alpha
from lora_compose.pipelines.formats.change import MAX_RANK
from lora_compose.pipelines.formats.files import read_words
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.scene.given import is_fields
from lora_compose.pipelines.scene.scene import Concept, ConceptNames, concepts_of
from lora_compose.pipelines.scene.sources import LoraFiles, files_of, shown, weighted
from lora_compose.pipelines.support.hub import is_hub_name
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.support.spelling import did_you_mean

logger = logging.getLogger(__name__)


Addable = str | Path | Iterable[str | Path | Concept | Mapping[str, Any]] | Mapping[str, Any]
"""A folder, files, concepts or their fields; or fields by name."""


class LoadsConcepts(Protocol):
    """A pipeline of diffusers, as its library needs it; what has models as attributes is read by `match`."""

    def get_list_adapters(self) -> Mapping[str, Sequence[str]]:
        """Names of the adapters of each model."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Makes an image, for mergers that measure a model."""
        ...


@dataclass(frozen=True)
class Added:
    """A concept as it was added, and with the words in its file's header; the file may not have been read yet."""

    given: Concept
    concept: Concept


class ConceptLibrary:
    """Concepts of one pipeline by name; it keeps no reference to the pipeline, which each call names."""

    def __init__(self) -> None:
        self.loaded: dict[str, LoadedConcept] = {}
        self.added: dict[str, Added] = {}
        self.recent = Recent()
        self._reads: dict[str, tuple[tuple[Hashable, ...], Read]] = {}

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The loaded and the added concepts by name."""
        return {name: entry.concept for name, entry in {**self.loaded, **self.added}.items()}

    def load(
        self,
        pipe: LoadsConcepts,
        concept: Concept,
        paths: Sequence[Path],
        *,
        max_rank: int = MAX_RANK,
        allow_pickle: bool = False,
    ) -> Concept:
        """Reads a concept's file, or merges several, and keeps it. LoraError if it is unusable or does not fit."""
        usual = max_rank == MAX_RANK and not allow_pickle
        key = file_key(paths, (_options(concept), max_rank, allow_pickle))
        read = self._loaded_from(key) or (self.recent.find(paths, _options(concept)) if usual else None)
        if read is None:
            read = _read(pipe, concept, paths, max_rank=max_rank, allow_pickle=allow_pickle)
        self._reads[concept.name] = key, read
        _warn_of_rest(read)
        logger.info("concept %s: %s", concept.name, read.factors.report)
        loaded = self.loaded[concept.name] = _loaded_concept(concept, read)
        return loaded.concept

    def _loaded_from(self, key: Hashable) -> Read | None:
        """What another concept was loaded from: several subjects of one file share its factors."""
        return next((read for other, read in self._reads.values() if other == key), None)

    def add(self, pipe: LoadsConcepts, source: Addable) -> tuple[Concept, ...]:
        """Adds files by their headers; see `ComposePipeline.add_concepts`."""
        added = by_headers(source)
        for name, entry in added.items():
            before = self.added.get(name)
            if before is None or _loras(before.given) != _loras(entry.given):
                self.check_new(pipe, name)
        self.added.update(added)
        return tuple(entry.concept for entry in added.values())

    def check_new(self, pipe: LoadsConcepts, name: str) -> None:
        """Raises ValueError if a name is taken."""
        if name in self.concepts or name in adapters_of(pipe):
            raise ValueError(f"there is a concept or adapter {name!r} already; unload it or choose another name")

    def unload(self, name: str) -> None:
        """Removes a concept; raises ValueError if there is none of that name."""
        if name not in self.concepts:
            raise ValueError(f"no concept {name!r} is loaded; there are {', '.join(self.concepts) or 'none'}")
        self.loaded.pop(name, None)
        self._reads.pop(name, None)
        self.added.pop(name, None)

    def is_outdated(self, name: str) -> bool:
        """Whether a file of a loaded concept has changed since it was read; one that is gone has not."""
        if name not in self._reads:
            return False
        (*before, _), read = self._reads[name]
        try:
            *now, _ = file_key([file.path for file in read.files], None)
        except OSError:
            return False
        return now != before

    def resolve(self, pipe: LoadsConcepts, concepts: ConceptNames, memory: int) -> tuple[LoadedConcept, ...]:
        """The concepts of a call with their factors; given fields override loaded ones.

        Args:
            concepts: Names of loaded concepts or adapters, `Concept` objects or their fields; or by name (`fields_of`).
            memory: Bytes of read files that stay in memory.

        Raises:
            ValueError: For unknown names and names given twice.
        """
        given = concepts_of(concepts)
        resolved = tuple(_with_composed_words(self._resolve(pipe, concept)) for concept in given)
        self.recent.trim(memory, keep=len(given))
        return resolved

    def _resolve(self, pipe: LoadsConcepts, concept: Concept) -> LoadedConcept:
        if concept.is_bystander:
            return LoadedConcept(concept.model_copy(update={"weight": 0.0}), NO_LORA)
        loaded, added = self.loaded.get(concept.name), self.added.get(concept.name)
        if added is not None and (concept.lora is None or _loras(concept) == _loras(added.given)):
            concept = concept.completed(added.given)
        if concept.lora is not None and (loaded is None or not _same_source(concept, loaded.concept)):
            return self._from_disk(pipe, concept)
        if loaded is not None:
            if concept.alpha is not None and concept.alpha != loaded.concept.alpha:
                raise ValueError(f"concept {concept.name!r} was loaded with another alpha; give it to load_concept")
            return LoadedConcept(concept.completed(loaded.concept), loaded.factors, loaded.files)
        if concept.name in adapters_of(pipe):
            return LoadedConcept(
                concept.completed(Concept(name=concept.name, weight=1.0)), adapter_factors(pipe, concept.name)
            )
        known = ", ".join([*self.concepts, *sorted(adapters_of(pipe))]) or "none"
        raise ValueError(
            f"unknown concept {concept.name!r}; loaded are {known}. Load it with load_concept(file, name=...)"
            + did_you_mean(concept.name, [*self.concepts, *adapters_of(pipe)])
        )

    def _from_disk(self, pipe: LoadsConcepts, concept: Concept) -> LoadedConcept:
        """A concept whose files are read, unless they are still in memory."""
        paths = [find_file(source) for source in files_of(concept.lora)]

        def read() -> Read:
            if (there := self._loaded_from(file_key(paths, (_options(concept), MAX_RANK, False)))) is not None:
                return there
            fresh = _read(pipe, concept, paths)
            _warn_of_rest(fresh)
            return fresh

        return _loaded_concept(concept, self.recent.get(paths, _options(concept), read))

    def read_ahead(self, models: object, concept: Concept, memory: int) -> Factors:
        """Reads a concept's file and matches it, so that the next call with it need not; for any thread.

        Args:
            models: The models of the pipeline, or others of their names and shapes, without weights: so the pipeline
                may be in use meanwhile.
            concept: With one file.
            memory: Bytes of read files that stay in memory.

        Raises:
            LoraError: If the file is unusable or does not fit the models.
        """
        (path,) = map(find_file, files_of(concept.lora))
        read = self.recent.get([path], _options(concept), lambda: _read_file(models, concept, path))
        self.recent.trim(memory, keep=1)
        return read.factors


def by_headers(source: Addable) -> dict[str, Added]:
    """The concepts of a folder or of files by name, with the words in their headers; no model is needed for it.

    Raises:
        LoraError: If there is no such file or folder, or none in it; or if the model hub does not give it.
        ValueError: If two would have one name.
    """
    added: dict[str, Added] = {}
    for given in _in_files(source):
        name = given.name
        if name in added:
            raise ValueError(
                f"{shown(added[name].given.lora)} and {shown(given.lora)} would both be called {name!r}; "
                "name them: Concept(name=..., lora=...)"
            )
        added[name] = Added(given, given.completed(_by_header(given)))
    return added


def adapters_of(pipe: LoadsConcepts) -> set[str]:
    """Names of the adapters that the user has loaded with `load_lora_weights`."""
    return {name for names in pipe.get_list_adapters().values() for name in names}


def _read(
    pipe: LoadsConcepts,
    concept: Concept,
    paths: Sequence[Path],
    *,
    max_rank: int = MAX_RANK,
    allow_pickle: bool = False,
) -> Read:
    """The LoRA of a concept: its file, or its files merged."""
    if len(paths) == 1:
        return _read_file(pipe, concept, paths[0], max_rank=max_rank, allow_pickle=allow_pickle)
    merger = merger_for(concept.merge, len(paths))
    files = [read_lora(path, allow_pickle=allow_pickle) for path in paths]
    alphas = [needed_alpha(concept.alpha, file) for file in files]
    matched = [match(file, pipe, alpha=alpha, max_rank=max_rank) for file, alpha in zip(files, alphas, strict=True)]
    merged = merge_matched(pipe, files, matched, [weight for _, weight in weighted(concept.lora)], merger)
    return Read(tuple(map(without_tensors, files)), merged)


def _read_file(
    models: object, concept: Concept, path: Path, *, max_rank: int = MAX_RANK, allow_pickle: bool = False
) -> Read:
    file = read_lora(path, allow_pickle=allow_pickle)
    return Read((file,), match(file, models, alpha=concept.alpha, max_rank=max_rank, products=True))


def _warn_of_rest(read: Read) -> None:
    """Warns of what a LoRA does not use of its files, or not exactly."""
    if not read.factors.complete:
        warn(f"{' + '.join(file.path.name for file in read.files)}: {read.factors.report}")


def _options(concept: Concept) -> Hashable:
    """What decides, with its files, what a concept's LoRA is."""
    return concept.alpha, concept.merge, tuple(weight for _, weight in weighted(concept.lora))


def _in_files(source: Addable) -> Iterable[Concept]:
    """The concepts to add; every one has a file, which is downloaded if it is in a hub repository."""
    entries: Iterable[Any]
    if isinstance(source, Mapping):
        entries = concepts_of(source)
    elif isinstance(source, str) or not isinstance(source, Iterable):
        path = local_path(source)
        entries = sorted(path.glob("*.safetensors")) if path.is_dir() else [source]
        if not entries:
            raise LoraError(f"{path} has no safetensors files")
    else:
        entries = source
    for entry in entries:
        if is_fields(entry):
            (entry,) = concepts_of([entry])
        concept = entry if isinstance(entry, Concept) else Concept(name=local_path(entry).stem, lora=str(entry))
        missing = [source for source in files_of(concept.lora) if not _found(source)]
        if concept.lora is None or missing:
            raise LoraError(
                f"concept {concept.name!r} needs a file, and there is none at {missing[0] if missing else None!r}"
            )
        yield concept


def _found(source: str) -> bool:
    """Whether there is a file; one in a hub repository is downloaded."""
    return (find_file(source) if is_hub_name(source) else local_path(source)).is_file()


def _by_header(given: Concept) -> Concept:
    """Adds the words in the header of the concept's file, of several the first.

    A file that cannot be read is named in a warning; the call that needs it refuses it.
    """
    words = Words()
    try:
        words = read_words(find_file(files_of(given.lora)[0]))
    except (LoraError, OSError) as error:
        warn(f"{error}; {given.name!r} is known by its name alone")
    return Concept(name=given.name, trigger=words.trigger, class_word=words.class_word, weight=1.0)


def _loaded_concept(concept: Concept, read: Read) -> LoadedConcept:
    """A concept with the factors of its file, which also completes missing fields; of several files the first does."""
    first = read.files[0]
    known = Concept(
        name=concept.name, trigger=first.trigger, class_word=first.class_word, references=first.reads_references,
        weight=1.0,
    )  # fmt: skip
    return LoadedConcept(concept.completed(known), read.factors, read.files)


def _with_composed_words(loaded: LoadedConcept) -> LoadedConcept:
    """A concept whose words are in NFC, as the prompts of calls are."""
    words = {name: getattr(loaded.concept, name) for name in ("trigger", "class_word", "prompt")}
    composed = {name: normalize("NFC", text) for name, text in words.items() if text}
    if composed.items() <= words.items():
        return loaded
    return replace(loaded, concept=loaded.concept.model_copy(update=composed))


def _same_source(concept: Concept, loaded: Concept) -> bool:
    """Whether a concept's LoRA is the loaded one, at the same strength."""
    return _loras(concept) == _loras(loaded) and concept.alpha in (None, loaded.alpha)


def _loras(concept: Concept) -> tuple[LoraFiles, str | None]:
    """The files of a concept, and how they are merged."""
    return concept.lora, concept.merge
