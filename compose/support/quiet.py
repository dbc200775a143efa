"""Switches off the progress bars of diffusers and transformers while ours are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as of_diffusers
import transformers.utils.logging as of_transformers


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of the two libraries inside this block."""
    before = [(library, library.is_progress_bar_enabled()) for library in (of_diffusers, of_transformers)]
    for library, _ in before:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, shown in before:
            if shown:
                library.enable_progress_bar()
