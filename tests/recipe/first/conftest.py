"""Artwork for the tests of the first recipe."""

import numpy as np
import pytest

from recipe.first import world


@pytest.fixture(scope="session")
def sprites() -> dict[str, np.ndarray]:
    """Artwork made up: a grey disc, square or bar of its own shape for every class and vendor."""
    found = {}
    ys, xs = np.mgrid[:96, :96] - 48
    for i, name in enumerate(world.BASE_CLASSES):
        for j, vendor in enumerate(world.VENDORS):
            inside = np.abs(xs) ** (1 + j) * (1 + 0.1 * (i % 11)) + np.abs(ys) ** (1 + j) < 44 ** (1 + j)
            shade = (90 + 5 * i + (ys + 48) // 2)[..., None].repeat(3, 2)
            found[f"{name}/{vendor}"] = np.concatenate([shade, 255 * inside[..., None]], 2).clip(0, 255).astype("u1")
    return found
