"""The table of seconds per step counts what really runs."""

import pytest

pytestmark = pytest.mark.comfyui


def test_the_table_has_what_each_way_runs() -> None:
    from comfy_speed import compare, table

    found = compare(side=8, steps=2, rounds=1, width=32)
    rows = {way.name: sum(way.rows) / 2 for way in found}
    assert rows.pop("ComfyUI: two LoRA hooks by mask") == 3, "one for each mask, and one for guidance"
    assert {*rows.values()} == {2}
    assert all(min(way.steps) > 0 for way in found)
    printed = table(found, samplings=1, steps=2).splitlines()
    assert len(printed) == 2 + len(found)
    assert printed[2].startswith("| base model | 2 | ")
