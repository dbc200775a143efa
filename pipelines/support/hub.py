"""The model hub: whether it can be reached, what its errors mean, and whether its files arrived as they are there."""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds until a hub that does not answer counts as out of reach."""


_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHERE = ("cache_dir", "revision", "repo_type")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


class HubError(OSError):
    """The model hub did not give what was asked; the message says what to do."""


@contextmanager
def asking(repository: str, **options: Any) -> Iterator[None]:
    """Inside this block files of a repository are downloaded; what goes wrong is said with advice. Nothing for folders.

    Weights that are new in the cache are compared with their SHA-256, by which the cache names them. The hub's client
    compares sizes alone. It resumes a download whose connection breaks, up to five times without new bytes.

    Args:
        repository: "owner/name", or a folder.
        options: Options of `huggingface_hub` that were given; `cache_dir`, `revision` and `repo_type` are read.

    Raises:
        HubError: If the repository is gated, private or missing, or the revision or a file is; if the connection broke;
            or if a file is not the hub's, which is then removed from the cache.
    """
    if not is_hub_name(repository):
        yield
        return
    blobs = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    kind = options.get("repo_type") or "model"
    blobs = blobs / repo_folder_name(repo_id=repository, repo_type=kind) / "blobs"
    before = _weights_in(blobs)
    try:
        yield
    except Exception as error:  # the types depend on the libraries that download for us
        _compare(repository, _weights_in(blobs) - before)
        meaning = _meaning(repository, page(repository, kind), options.get("revision"), error)
        if meaning is None:
            raise
        raise HubError(meaning) from error
    _compare(repository, _weights_in(blobs) - before)


def _weights_in(blobs: Path) -> set[Path]:
    """Files of the cache that are named by their SHA-256."""
    return {path for path in blobs.glob("*") if _SHA256.fullmatch(path.name)}


def _compare(repository: str, downloaded: set[Path]) -> None:
    wrong = []
    for path in sorted(downloaded):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != path.name:
            wrong.append((path, digest))
    for path, _ in wrong:
        path.unlink()
    if wrong:
        path, digest = wrong[0]
        raise HubError(
            f"a file of {repository!r} arrived with other bytes than the model hub has: its SHA-256 is {digest}, "
            f"expected {path.name}. It was removed from the cache: try again, then without a proxy or mirror"
        )


def page(repository: str, repo_type: str = "model") -> str:
    """The address of a repository's page. `repo_type` is "model" or "dataset"."""
    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repository}"


def _meaning(repository: str, page: str, revision: str | None, error: BaseException) -> str | None:
    """What an error of the hub means, also one that diffusers hides behind its own; None for other errors."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    for link in chain:
        if isinstance(link, GatedRepoError):
            return f"the repository {repository!r} is gated: accept its conditions on {page}, and {_LOG_IN}"
        if isinstance(link, RepositoryNotFoundError):
            return f"the model hub has no repository {repository!r}, or it is private: check the name, or {_LOG_IN}"
        if isinstance(link, RevisionNotFoundError):
            return f"the repository {repository!r} has no revision {revision!r}: see its branches and tags on {page}"
        if isinstance(link, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return (
                f"the cache has not all files of {repository!r}, and only the cache is read: connect to the network, "
                "without HF_HUB_OFFLINE and local_files_only, and try again; what is there is not downloaded again"
            )
        if isinstance(link, EntryNotFoundError):
            return f"the repository {repository!r} lacks a file ({_first_line(link)}): see its files on {page}"
        if isinstance(link, HfHubHTTPError):
            return f"the model hub refused a request for {repository!r} ({_first_line(link)}): try again later"
        if isinstance(link, OSError) and "no file named" in str(link):  # as diffusers says it
            lacking = f"the repository {repository!r} lacks a file of the model ({_first_line(link)})"
            return f"{lacking}: see its files on {page}"
        if type(link).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "httpcore"):
            return (
                f"the connection to the model hub broke while {repository!r} was downloaded ({_first_line(link)}): try "
                "again; files that are complete stay in the cache and are not downloaded again"
            )
    return None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__


def is_hub_name(source: str) -> bool:
    """Whether a name can only be a hub repository: "owner/name", and no folder of that name exists."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def reachable(repository: str, *files: str, **options: Any) -> dict[str, Any]:
    """The options for reading a repository; if the hub is out of reach, those that read the cache only.

    `huggingface_hub` asks six times for each file, for half a minute, before it looks into its cache or gives up.

    Args:
        repository: "owner/name".
        files: Every copy of it has one of these, if any are named.
        options: Options of `huggingface_hub` that the user has given.

    Raises:
        ConnectionError: If the hub is out of reach, and the cache has no copy.
    """
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return options
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the type depends on huggingface_hub's HTTP library
        where = {name: options[name] for name in _WHERE if options.get(name) is not None}
        if _has_copy(repository, files, where):
            logger.warning("the model hub is out of reach (%s): %s is read from the cache", error, repository)
            return {**options, "local_files_only": True}
        raise ConnectionError(
            f"the model hub {constants.ENDPOINT} is out of reach ({error}), and there is no copy of {repository!r} in "
            f"the cache {where.get('cache_dir', constants.HF_HUB_CACHE)}. Give a folder or a file instead of a "
            "repository, or connect to the network; HF_HUB_OFFLINE=1 reads the cache alone"
        ) from error
    return options


def cached_folder(repository: str, **options: Any) -> Path:
    """The folder in the cache with a repository's downloaded files, without asking; LocalEntryNotFoundError if none.

    Of the options of `huggingface_hub`, `cache_dir`, `revision` and `repo_type` are read.
    """
    where = {name: options[name] for name in _WHERE if options.get(name) is not None}
    return Path(snapshot_download(repository, local_files_only=True, **where))


def _has_copy(repository: str, files: tuple[str, ...], where: dict[str, Any]) -> bool:
    if files:
        return any(isinstance(try_to_load_from_cache(repository, file, **where), str) for file in files)
    try:
        cached_folder(repository, **where)
    except LocalEntryNotFoundError:
        return False
    return True
