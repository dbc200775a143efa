"""LRU cache of LoRA files, bounded in bytes."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_compose.pipelines.concepts.loading import Factors, LoraFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Read:
    """A file that has been read and matched, or several that were merged, then without their tensors."""

    files: tuple[LoraFile, ...]
    factors: Factors

    @cached_property
    def bytes(self) -> int:
        """The memory that it takes."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}.values())

    def _tensors(self) -> Iterator[Tensor]:
        for file in self.files:
            yield from file.tensors.values()
            for by_part in file.embeddings.values():
                yield from by_part.values()
        for lora in (self.factors.model, *self.factors.text_encoders.values()):
            for factors in lora.values():
                yield from factors.tensors


class Recent:
    """Cache of read files, ordered by use with the most recent at the end; for several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Read] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> "Recent":
        copied = Recent()  # with a lock of its own; what was read is never changed
        with self._lock:
            copied._kept.update(self._kept)
        return copied

    @property
    def bytes(self) -> int:
        """The memory that all kept files take."""
        return sum(read.bytes for read in self._kept.values())

    def get(self, paths: Sequence[Path], options: Hashable, read: Callable[[], Read]) -> Read:
        """The content of a file, or of those that are merged, read only if it is new or has changed on disk.

        It is cached for each combination of options. If reading fails, the cache is unchanged.
        """
        content = self.find(paths, options)
        if content is None:
            # The key of before: a file that changes meanwhile is read again.
            key, content = file_key(paths, options), read()
            with self._lock:
                self._kept[key] = content
        return content

    def find(self, paths: Sequence[Path], options: Hashable) -> Read | None:
        """The content of files that are in memory and have not changed on disk, otherwise None; as for `get`."""
        key = file_key(paths, options)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def trim(self, limit: int, keep: int) -> None:
        """Drops the least recently used files, but for the last `keep`, until the rest fits into so many bytes."""
        dropped = []
        with self._lock:
            excess = self.bytes - limit
            for key in list(self._kept)[: max(0, len(self._kept) - keep)]:
                if excess <= 0:
                    break
                dropped.append(self._kept.pop(key))
                excess -= dropped[-1].bytes
        for read in dropped:
            size, names = read.bytes / 2**20, " + ".join(str(file.path) for file in read.files)
            logger.debug("%s leaves the memory (%.1f MiB); its next use reads it again", names, size)


def file_key(paths: Sequence[Path], options: Hashable) -> tuple[Hashable, ...]:
    """Stands for the content of files, as they are on disk now, read with these options."""
    return *map(_identity, paths), options


def _identity(path: Path) -> tuple[Path, int, int, int]:
    facts = path.stat()
    return path, facts.st_ino, facts.st_mtime_ns, facts.st_size
