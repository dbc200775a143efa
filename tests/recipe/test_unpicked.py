"""Unpicked sheets have every character, every method and every seed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.pipelines.methods import METHODS as ALL_METHODS
from recipe.plain import PROMPTS
from recipe.unpicked import FEW, METHODS, SIDE, Group, drawn, everything, files, make_all
from recipe.world import CHARACTERS


@pytest.mark.parametrize("model", METHODS)
def test_every_prompt_every_character_and_every_method_has_a_row(model: str) -> None:
    rows = list(everything(model))
    by_group = {group: [shown for shown in rows if shown.group is group] for group in Group}
    assert [shown.prompt for shown in by_group[Group.PLAIN]] == list(PROMPTS)
    assert [shown.names for shown in by_group[Group.ALONE]] == [(name,) for name in CHARACTERS]
    assert [shown.method for shown in by_group[Group.PAIR]] == METHODS[model]
    for group in (Group.ONE_CLASS, Group.THREE):
        assert {shown.method for shown in by_group[group]} == set(FEW)
    assert len({(shown.prompt, shown.method) for shown in rows}) == len(rows)


def test_a_unet_is_shown_with_all_methods() -> None:
    assert set(METHODS[PLAYGROUND]) == {name for name in ALL_METHODS if ":" not in name}


@pytest.mark.slow
def test_a_rerun_makes_what_is_missing_and_a_seed_does_not_depend_on_the_others(tmp_path: Path) -> None:
    groups, seeds = [Group.THREE], list(range(5))  # a batch of four, and another one
    done: list[tuple[int, int]] = []

    def on_images(made: int, total: int) -> None:
        done.append((made, total))

    make_all(tmp_path, PLAYGROUND, groups, seeds, 2, on_images)
    rows = [(number, shown) for number, shown in enumerate(everything(PLAYGROUND)) if shown.group is Group.THREE]
    assert done[:3] == [(4, 5 * len(rows)), (5, 5 * len(rows)), (9, 5 * len(rows))]
    first = {path: path.read_bytes() for number, shown in rows for path in files(tmp_path, number, shown, seeds)}
    last = files(tmp_path, *rows[1], seeds)[4]
    make_all(tmp_path / "alone", PLAYGROUND, groups, [4], 2, on_images)
    alone = files(tmp_path / "alone", *rows[1], [4])[0]
    beside, itself = (np.asarray(Image.open(path)).astype(int) for path in (last, alone))
    assert np.abs(beside - itself).max() <= 2  # of 255: rounding
    last.unlink()
    make_all(tmp_path, PLAYGROUND, groups, seeds, 2, on_images)
    assert {path: path.read_bytes() for path in first} == first
    image = drawn(
        [
            (shown, "right in 0 of 5", [Image.open(path) for path in files(tmp_path, n, shown, seeds)])
            for n, shown in rows
        ],
        seeds,
    )
    assert image.width > len(seeds) * SIDE
    assert image.height > len(rows) * SIDE
