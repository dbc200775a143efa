"""Suites of public models and LoRAs: what they download, and under which licences."""

import os
import re
from collections.abc import Iterator, Mapping
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
        found = {"revision": self.revision, "repo_type": "dataset" if self.dataset else None}
        return {name: value for name, value in found.items() if value is not None}

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
        suite: The suite.
    """

    downloads: Annotated[Mapping[Name, Download], Field(min_length=1)]
    references: Mapping[Name, Alone] = {}
    suite: Suite

    @property
    def sources(self) -> list[str]:
        """All that the suite reads, by the names that it uses."""
        used: dict[str, None] = {}
        moved_suite(self.suite, lambda source: (used.setdefault(source), source)[1])
        return list(used)

    @property
    def elsewhere(self) -> list[str]:
        """Repositories of the hub that the suite names without a download: they are read when they are opened."""
        return [source for source in self.sources if source not in self.downloads and is_hub_name(source)]

    @model_validator(mode="after")
    def _used(self) -> Self:
        if unread := sorted(self.downloads.keys() - set(self.sources)):
            raise ValueError(f"nothing in the suite names the download {unread[0]!r}")
        if twice := sorted(self.downloads.keys() & self.references.keys()):
            raise ValueError(f"{twice[0]!r} is the name of a download and of references")
        for name, one in self.references.items():
            _check_alone(name, one, self.suite)
        return self


def _check_alone(name: str, one: Alone, suite: Suite) -> None:
    concepts = [concept for concept in suite.concepts if concept.references == name]
    if len(concepts) != 1:
        raise ValueError(f"the references {name!r} are those of {len(concepts)} concepts; one has to name them")
    if not find_words(concepts[0].trigger, one.prompt):
        raise ValueError(f"references {name!r}: the prompt does not have the trigger {concepts[0].trigger!r}")
    if both := sorted({*one.seeds} & {*suite.seeds}):
        raise ValueError(f"references {name!r}: the seed {both[0]} is one of the suite's; choose others")


@dataclass(frozen=True)
class Wanted:
    """A download, and its bytes in all and outside of the cache; None if the hub was not asked."""

    name: str
    download: Download
    size: int | None
    missing: int | None


def read_published(path: Path) -> Published:
    """Reads a published suite. Relative paths in it are relative to its file.

    Raises:
        FileError: If it is missing, unreadable or wrong; the message names the field.
    """
    found, base = read_as(Published, path), path.parent.absolute()
    named = found.downloads.keys() | found.references.keys()
    suite = moved_suite(found.suite, lambda source: source if source in named else local_source(source, base))
    return found.model_copy(update={"suite": suite})


def show_published(path: Path, folder: Path | None = None) -> tuple[Published, Path]:
    """Reads a published suite, shows its images, downloads and licences, and returns it with the folder of its results.

    Args:
        folder: For the results; None is one of the suite's name.

    Raises:
        FileError: As `read_published`.
        OSError: As `wanted`.
    """
    published = read_published(path)
    to = folder or Path("outputs/evaluation") / published.suite.name
    images = sum(len(batch.seeds) for batch in batches(published.suite))
    further = sum(len(one.seeds) for one in published.references.values())
    references = f", and {further} to compare with" if further else ""
    echo(f"{published.suite.name}: {images} images{references}, in {to}")
    for one in wanted(published):
        licence = one.download.licence or f"see {one.download.page}"
        size = "size not known without the hub"
        if one.size is not None:
            size = f"{gib(one.size)}, {gib(one.missing or 0)} to download"
        echo(f"  {one.name}: {one.download.repository}, {one.download.pinned}, {size}; licence: {licence}")
    for source in published.elsewhere:
        echo(f"  {source}: none of the downloads, not pinned, read when it is opened; licence: see {page(source)}")
    return published, to


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"


def wanted(published: Published) -> Iterator[Wanted]:
    """What is to be downloaded. Only lists of files are asked for, and whether they may be read.

    Raises:
        HubError: If the hub refuses a repository, or has another file than the suite names.
        ConnectionError: If the hub is out of reach, and the cache has no copy.
    """
    for source in published.elsewhere:
        _listed(Download(repository=source, files="*.json"))
    for name, one in published.downloads.items():
        files = _listed(one)
        if files is None:
            yield Wanted(name, one, None, None)
            continue
        if one.sha256 is not None and files[0].lfs is not None and files[0].lfs.sha256 != one.sha256:
            raise HubError(
                f"{one.repository}/{one.file} is another file than the suite names: its SHA-256 is "
                f"{files[0].lfs.sha256}, expected {one.sha256}; give the revision that had it, or the new SHA-256"
            )
        cached = [try_to_load_from_cache(one.repository, file.path, **one.options) for file in files]
        missing = sum(file.size for file, path in zip(files, cached, strict=True) if not isinstance(path, str))
        yield Wanted(name, one, sum(file.size for file in files), missing)


def _listed(one: Download) -> list[RepoFile] | None:
    """The files of a download, which may be read; None without the hub, if the cache has a copy."""
    if constants.HF_HUB_OFFLINE or reachable(one.repository, **one.options) != one.options:
        return None
    with asking(one.repository, **one.options):
        tree = list(list_repo_tree(one.repository, recursive=True, **one.options))
        files = [file for file in tree if isinstance(file, RepoFile) and one.takes(file.path)]
        for file in files[:1]:  # anybody may list the files of a gated repository
            get_hf_file_metadata(hf_hub_url(one.repository, file.path, **one.options))
    lacking = [pattern for pattern in one.patterns if not any(fnmatch(file.path, pattern) for file in files)]
    if not files or lacking:
        there = one.file or ", ".join(lacking) or "a model of diffusers"
        raise HubError(f"the repository {one.repository!r} has no {there}: see {one.page}")
    return files


def fetch(published: Published) -> Suite:
    """Downloads what is missing, with progress, and returns the suite with the paths of the files.

    Raises:
        HubError: If the hub does not give a file, or gives another one than the suite names.
    """
    paths = {name: str(_fetched(one)) for name, one in published.downloads.items()}
    return moved_suite(published.suite, lambda source: paths.get(source, source))


def _fetched(one: Download) -> Path:
    options = reachable(one.repository, **one.options)
    with asking(one.repository, **options):
        if one.file is not None:
            path = Path(hf_hub_download(one.repository, one.file, **options))
        elif one.files is not None:
            folder = Path(snapshot_download(one.repository, allow_patterns=list(one.patterns), **options))
            path = folder / os.path.commonpath([PurePosixPath(pattern).parent for pattern in one.patterns])
        else:
            path = Path(str(DiffusionPipeline.download(one.repository, use_safetensors=True, **options)))
    if one.sha256 is not None and (found := sha256_of(path)) != one.sha256:
        raise HubError(f"{path} is another file than the suite names: its SHA-256 is {found}, expected {one.sha256}")
    return path


def write_suite(suite: Suite, path: Path) -> None:
    """Writes a suite for `lora-compose evaluate`."""
    write_text(path, to_yaml(suite.model_dump(mode="json", exclude_defaults=True)))
