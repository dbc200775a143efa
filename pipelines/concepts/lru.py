"""LRU cache of LoRA files, bounded in bytes."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_compose.pipelines.concepts.loading import Factors, LoraFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Read:
    """A file that has been read and matched.

    Attributes:
        file: As read.
        factors: Its factors for the pipeline's models.
    """

    file: LoraFile
    factors: Factors

    @cached_property
    def bytes(self) -> int:
        """The memory that it takes."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.file.tensors.values()
        for by_part in self.file.embeddings.values():
            yield from by_part.values()
        for lora in (self.factors.model, *self.factors.text_encoders.values()):
            for factors in lora.values():
                yield from factors.tensors


class Recent:
    """Cache of read files, ordered by use with the most recent at the end."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Read] = OrderedDict()

    @property
    def bytes(self) -> int:
        """The memory that all of them take."""
        return sum(read.bytes for read in self._kept.values())

    def get(self, path: Path, options: Hashable, read: Callable[[], Read]) -> Read:
        """The content of a file, read only if it is not in memory or has changed on disk.

        Args:
            path: The file.
            options: Options of reading; a file is cached for each combination.
            read: Reads it. If that fails, the cache is unchanged.
        """
        facts = path.stat()
        key = path, facts.st_ino, facts.st_mtime_ns, facts.st_size, options
        if key not in self._kept:
            self._kept[key] = read()
        self._kept.move_to_end(key)
        return self._kept[key]

    def trim(self, limit: int, keep: int) -> None:
        """Drops the least recently used files until the rest fits.

        Args:
            limit: Bytes.
            keep: How many of the most recently used stay in any case.
        """
        excess = self.bytes - limit
        for key in list(self._kept)[: max(0, len(self._kept) - keep)]:
            if excess <= 0:
                break
            read = self._kept.pop(key)
            excess -= read.bytes
            size = read.bytes / 2**20
            logger.debug("%s leaves the memory (%.1f MiB); its next use reads it again", read.file.path, size)
