"""Suites of public models and LoRAs: what they download, and under which licences."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    list_repo_tree,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.hf_api import RepoFile
from pydantic import Field, model_validator

from lora_compose.compose.evaluation.alone import Alone
from lora_compose.compose.evaluation.batches import batches
from lora_compose.compose.evaluation.suite import Name, Suite, moved_suite
from lora_compose.compose.evaluation.trained import Trained
from lora_compose.compose.files.paths import local_source
from lora_compose.compose.files.scenes import read_as
from lora_compose.compose.files.stored import write_text
from lora_compose.compose.files.text import to_yaml
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.terminal import echo
from lora_compose.pipelines.support.hub import HubError, asking, is_hub_name, page, reachable
from lora_compose.pipelines.support.regular import sha256_of
from lora_compose.pipelines.text.tokens import find_words

_MODEL = ("*.json", "*.safetensors", "*.txt", "*.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Download(Frozen):
    """Files of a hub repository.

    Attributes:
        repository: "owner/name".
        file: One file, such as a LoRA; None is a whole model as diffusers opens it, or `files`.
        files: A pattern for several files, such as "references/*.jpg", or several patterns, such as "*.json" and
            "model.safetensors"; the source is their folder. Each pattern has to match something.
        dataset: Whether it is a repository of data, such as photographs, instead of models.
        revision: Branch, tag or commit; None is the main branch, which may change.
        licence: Under which it is published, as its page says; None if that is not known.
        sha256: Of the one file; None is not compared with anything but the hub's own.
    """

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    file: str | None = None
    files: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    dataset: bool = False
    revision: str | None = None
    licence: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.file is not None and self.files is not None:
            raise ValueError("give file or files, not both")
        if self.sha256 is not None and self.file is None:
            raise ValueError("sha256 is of one file: give file as well")
        if self.dataset and self.file is None and self.files is None:
            raise ValueError("a data set is no model: give file or files")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Glob patterns of the files to download."""
        return (self.files,) if isinstance(self.files, str) else self.files or ()

    @property
    def pinned(self) -> str:
        """The commit or SHA-256 that the files are pinned to, or "not pinned", as `--plan` prints it."""
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return f"commit {self.revision[:12]}"
        if self.sha256 is not None:
            return f"SHA-256 {self.sha256[:12]}"
        return f"{'the main branch' if self.revision is None else self.revision}, not pinned"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `huggingface_hub` that identify the repository."""
        options = {"revision": self.revision, "repo_type": "dataset" if self.dataset else None}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def page(self) -> str:
        """The address of the repository's page."""
        return page(self.repository, "dataset" if self.dataset else "model")

    def takes(self, path: str) -> bool:
        """Whether a file of the repository is downloaded; of models, about: diffusers chooses."""
        if self.file is not None:
            return path == self.file
        if self.files is not None:
            return any(fnmatch(path, pattern) for pattern in self.patterns)
        return any(fnmatch(path, pattern) for pattern in _MODEL) and path.count("/") < 2


class Published(Frozen):
    """A suite whose sources are names of downloads, or local.

    Attributes:
        downloads: What is downloaded, by the names that the suite uses as sources.
        references: References that the LoRA of a concept makes alone, by the name that the concept uses as its own.
        trainings: LoRAs that are trained first, by the name that the concept uses as its own.
    """

    downloads: Annotated[Mapping[Name, Download], Field(min_length=1)]
    references: Mapping[Name, Alone] = {}
    trainings: Mapping[Name, Trained] = {}
    suite: Suite

    @property
    def sources(self) -> list[str]:
        """All that the suite and its trainings read, by the names that they use."""
        used: dict[str, None] = {}
        self.moved(lambda source: (used.setdefault(source), source)[1])
        return list(used)

    def moved(self, move: Callable[[str], str]) -> "Published":
        """A copy with every path of the suite and its trainings changed by a function."""
        trainings = {
            name: trained.model_copy(
                update={
                    "images": move(trained.images),
                    "model": trained.model if trained.model is None else move(trained.model),
                }
            )
            for name, trained in self.trainings.items()
        }
        return self.model_copy(update={"suite": moved_suite(self.suite, move), "trainings": trainings})

    @property
    def elsewhere(self) -> list[str]:
        """Repositories of the hub that the suite names without a download: they are read when they are opened."""
        return [source for source in self.sources if source not in self.downloads and is_hub_name(source)]

    @model_validator(mode="after")
    def _used(self) -> Self:
        if unread := sorted(self.downloads.keys() - set(self.sources)):
            raise ValueError(f"nothing in the suite names the download {unread[0]!r}")
        for kind, named in (("references", self.references), ("a training", self.trainings)):
            if twice := sorted(self.downloads.keys() & named.keys()):
                raise ValueError(f"{twice[0]!r} is the name of a download and of {kind}")
        for name, alone in self.references.items():
            _check_alone(name, alone, self.suite)
        for name in self.trainings:
            concepts = [concept for concept in self.suite.concepts if name in concept.loras.values()]
            if len(concepts) != 1:
                raise ValueError(f"the training {name!r} is that of {len(concepts)} concepts; one has to name it")
        return self


def _check_alone(name: str, alone: Alone, suite: Suite) -> None:
    concepts = [concept for concept in suite.concepts if concept.references == name]
    if len(concepts) != 1:
        raise ValueError(f"the references {name!r} are those of {len(concepts)} concepts; one has to name them")
    if not find_words(concepts[0].trigger, alone.prompt, concepts[0].class_word):
        raise ValueError(f"references {name!r}: the prompt does not have the trigger {concepts[0].trigger!r}")
    if both := sorted({*alone.seeds} & {*suite.seeds}):
        raise ValueError(f"references {name!r}: the seed {both[0]} is one of the suite's; choose others")


@dataclass(frozen=True)
class Wanted:
    """A download, and its bytes in all and outside of the cache; None if the hub was not asked."""

    name: str
    download: Download
    size: int | None
    missing: int | None


def read_published(path: Path) -> Published:
    """Reads a published suite, whose paths are relative to it. Raises FileError, which names the field."""
    published, base = read_as(Published, path), path.parent.absolute()
    named = published.downloads.keys() | published.references.keys() | published.trainings.keys()
    return published.moved(lambda source: source if source in named else local_source(source, base))


def show_published(path: Path, folder: Path | None = None) -> tuple[Published, Path]:
    """Reads a published suite, shows its images, downloads and licences; returns it with the folder of its results.

    By default one of the suite's name. Raises FileError as `read_published`, and OSError as `wanted`.
    """
    published = read_published(path)
    to = folder or Path("outputs/evaluation") / published.suite.name
    images = sum(len(batch.seeds) for batch in batches(published.suite))
    further = sum(len(alone.seeds) for alone in published.references.values())
    references = f", and {further} to compare with" if further else ""
    echo(f"{published.suite.name}: {images} images{references}, in {to}")
    for listed in wanted(published):
        licence = listed.download.licence or f"see {listed.download.page}"
        size = "size not known without the hub"
        if listed.size is not None:
            size = f"{gib(listed.size)}, {gib(listed.missing or 0)} to download"
        echo(f"  {listed.name}: {listed.download.repository}, {listed.download.pinned}, {size}; licence: {licence}")
    for name, trained in published.trainings.items():
        model = trained.model or published.suite.model
        echo(f"  {name}: trained, {trained.steps} steps on {model}, with {trained.images}")
    for source in published.elsewhere:
        echo(f"  {source}: none of the downloads, not pinned, read when it is opened; licence: see {page(source)}")
    return published, to


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"


def wanted(published: Published) -> Iterator[Wanted]:
    """What is to be downloaded. Only lists of files are asked for, and whether they may be read.

    Raises HubError if the hub refuses, or has another file than the suite names, and ConnectionError if it is out of
    reach and the cache has no copy.
    """
    for source in published.elsewhere:
        _listed(Download(repository=source, files="*.json"))
    for name, download in published.downloads.items():
        files = _listed(download)
        if files is None:
            yield Wanted(name, download, None, None)
            continue
        if download.sha256 is not None and files[0].lfs is not None and files[0].lfs.sha256 != download.sha256:
            raise HubError(
                f"{download.repository}/{download.file} is another file than the suite names: its SHA-256 is "
                f"{files[0].lfs.sha256}, expected {download.sha256}; give the revision that had it, or the new SHA-256"
            )
        cached = [try_to_load_from_cache(download.repository, file.path, **download.options) for file in files]
        missing = sum(file.size for file, path in zip(files, cached, strict=True) if not isinstance(path, str))
        yield Wanted(name, download, sum(file.size for file in files), missing)


def _listed(download: Download) -> list[RepoFile] | None:
    """The files of a download, which may be read; None without the hub, if the cache has a copy."""
    if constants.HF_HUB_OFFLINE or reachable(download.repository, **download.options) != download.options:
        return None
    with asking(download.repository, **download.options):
        tree = list(list_repo_tree(download.repository, recursive=True, **download.options))
        files = [file for file in tree if isinstance(file, RepoFile) and download.takes(file.path)]
        for file in files[:1]:  # anybody may list the files of a gated repository
            get_hf_file_metadata(hf_hub_url(download.repository, file.path, **download.options))
    lacking = [pattern for pattern in download.patterns if not any(fnmatch(file.path, pattern) for file in files)]
    if not files or lacking:
        there = download.file or ", ".join(lacking) or "a model of diffusers"
        raise HubError(f"the repository {download.repository!r} has no {there}: see {download.page}")
    return files


def fetch(published: Published) -> Published:
    """Downloads what is missing and returns suite and trainings with paths. HubError if the hub has other files."""
    paths = {name: str(_fetched(download)) for name, download in published.downloads.items()}
    return published.moved(lambda source: paths.get(source, source))


def _fetched(download: Download) -> Path:
    options = reachable(download.repository, **download.options)
    with asking(download.repository, **options):
        if download.file is not None:
            path = Path(hf_hub_download(download.repository, download.file, **options))
        elif download.files is not None:
            folder = Path(snapshot_download(download.repository, allow_patterns=list(download.patterns), **options))
            path = folder / os.path.commonpath([PurePosixPath(pattern).parent for pattern in download.patterns])
        else:
            path = Path(str(DiffusionPipeline.download(download.repository, use_safetensors=True, **options)))
    if download.sha256 is not None and (actual := sha256_of(path)) != download.sha256:
        raise HubError(
            f"{path} is another file than the suite names: its SHA-256 is {actual}, expected {download.sha256}"
        )
    return path


def write_suite(suite: Suite, path: Path) -> None:
    """Writes a suite for `lora-compose evaluate`."""
    write_text(path, to_yaml(suite.model_dump(mode="json", exclude_defaults=True)))
