"""Switches off the progress bars of diffusers and transformers while ours are shown; those of downloads stay."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as of_diffusers
import transformers.utils.logging as of_transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of the two libraries inside this block."""
    downloads_shown = not are_progress_bars_disabled()
    before = [(library, library.is_progress_bar_enabled()) for library in (of_diffusers, of_transformers)]
    for library, _ in before:
        library.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()  # transformers has switched them off with its own
    try:
        yield
    finally:
        for library, shown in before:
            if shown:
                library.enable_progress_bar()
