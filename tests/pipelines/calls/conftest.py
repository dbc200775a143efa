"""Fixtures: tiny pipelines, with concepts and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components import FAMILIES, random_lora, with_library
from composing import MORE_TRIGGERS, PLAIN, composer_of


@pytest.fixture
def pipe(family: str) -> Any:
    """A still smaller pipeline than the common one."""
    return FAMILIES[family]()


@pytest.fixture
def plain_pipe(family: str) -> Any:
    """diffusers' own pipeline with the same weights as `pipe`."""
    return FAMILIES[family](PLAIN[family])


@pytest.fixture
def composer(family: str) -> Any:
    """A tiny pipeline with the concepts "cat" and "dog", for one test."""
    return with_library(FAMILIES[family](), composer_of(family).library)


@pytest.fixture
def whole_composer(family: str) -> Any:
    """The same with LoRAs that change layers of every kind, text encoders too."""
    return with_library(FAMILIES[family](), composer_of(family, whole=True).library)


@pytest.fixture
def load_concepts(write_lora: Callable[..., Path]) -> Callable[..., None]:
    """Writes and loads concepts of random factors: `load_concepts(pipe, "cat", "bear")`."""

    def load(pipe: Any, *names: str, **options: Any) -> None:
        for name in names:
            metadata = {"trigger": MORE_TRIGGERS[name], "class_word": name, "method": "tara"}
            lora = random_lora(pipe.unet, list(MORE_TRIGGERS).index(name), **options)
            pipe.load_concept(write_lora(f"{name}-file", unet=lora, metadata=metadata), name)

    return load
