"""README's first picture shows each subject, its LoRA alone, and both by every method."""

import pytest

from recipe.front import ROWS, SIDE, Pair, drawn


@pytest.mark.usefixtures("small_by_default")
@pytest.mark.slow
def test_every_method_has_a_row_with_the_subject_its_lora_alone_and_all_seeds() -> None:
    made = 0

    def on_image() -> None:
        nonlocal made
        made += 1

    image = drawn([Pair(("cat", "dog"), "on grass")], seeds=2, steps=1, on_image=on_image)
    assert made == len(ROWS) * (1 + 2)
    assert image.width > 4 * SIDE
    assert image.height > len(ROWS) * SIDE
