"""The table of where maps and objects lie."""

from typing import Any

import pytest
import torch

from components import seeded
from flux import flux_pipeline
from lora_compose import Concept, Draft
from lora_compose.attention import backbone_of
from lora_compose.compose.evaluation.detectors import Detection
from recipe.drafts import DEFAULT, Fit, Watching, Where, fits, table, with_means
from recipe.plain import named

SUBJECTS = [Concept(name=name, role="bystander", class_word=name) for name in ("cat", "dog")]
CALL: dict[str, Any] = {
    "prompt": "a cat and a dog on grass", "concepts": SUBJECTS, "num_inference_steps": 3, "width": 128, "height": 128,
    "max_sequence_length": 48, "output_type": "latent",
}  # fmt: skip


def test_maps_are_those_of_the_draft_and_the_image_is_plain() -> None:
    pipe: Any = flux_pipeline(num_layers=2, num_single_layers=2, guidance_embeds=False)
    backbone = backbone_of(pipe.transformer)
    watching = Watching((0, 1))
    image = pipe(**CALL, method=watching, generator=seeded(3)).images
    blocks = [f"{kind}.{n}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for n in (0, 1)]
    assert list(watching.found) == [Where(block, step) for step in (0, 1) for block in blocks]
    plain = {name: value for name, value in CALL.items() if name != "concepts"}
    torch.testing.assert_close(image, pipe(**plain, generator=seeded(3)).images, atol=1e-5, rtol=0)
    found = with_means(watching.found, backbone.map_layers)
    for step, length in ((0, 0.1), (1, 2.0)):
        for layers, name in ((None, DEFAULT), ("transformer_blocks", "all transformer_blocks")):
            method = Draft(length=length, layers=layers)
            drafted = pipe(**CALL, method=method, generator=seeded(3), record_attention=[0]).draft_maps
            torch.testing.assert_close(found[Where(name, step)], drafted)
    middle = torch.stack([watching.found[Where(blocks[1], step)] for step in (0, 1)]).mean(dim=0)
    middle = (middle + torch.stack([watching.found[Where(blocks[2], step)] for step in (0, 1)]).mean(dim=0)) / 2
    torch.testing.assert_close(found[Where("middle third, steps so far", 1)], middle)


def test_a_map_fits_if_its_centre_and_region_are_where_the_judge_sees_the_object() -> None:
    maps = torch.zeros(2, 12, 12)
    maps[0, 6, 3] = maps[1, 6, 9] = 1
    seen = [Detection("cat", (0, 64, 96, 160), 0.9), Detection("dog", (48, 64, 144, 160), 0.8)]
    found = list(fits(maps, ("cat", "dog"), seen, (192, 192)))
    assert found[0] == Fit(True, 1.0)
    assert not found[1].centre, "the centre is at 152 pixels"
    assert found[1].region == pytest.approx(40 / 96, abs=0.02)
    assert list(fits(maps, ("cat", "dog"), seen[:1], (192, 192))) == found[:1]


def test_the_table_has_a_line_for_each_block() -> None:
    values = {Where(DEFAULT, 0): [1.0, 0.0], Where("a", 0): [1.0], Where(DEFAULT, 2): [0.25], Where("a", 2): []}
    title, steps, *lines = table("inside", values)
    assert title == "inside, by step"
    assert steps.split() == ["1", "3"]
    assert [line.split() for line in lines] == [["draft", "0.50", "0.25"], ["a", "1.00", "0.00"]]


@pytest.mark.parametrize(
    ("words", "all_there", "exactly", "copied"),
    [
        (["cat", "dog"], True, True, False),
        (["cat", "dog", "cat"], True, False, False),
        (["cat", "cat"], False, False, True),
        (["cat"], False, False, False),
    ],
)
def test_a_copy_is_one_twice_instead_of_another(words, all_there, exactly, copied) -> None:
    class Detector:
        def detect(self, image: Any, classes: Any) -> list[Detection]:
            return [Detection(word, (0, 0, 1, 1), 1.0) for word in words]

    assert named(Detector(), None, ("cat", "dog")) == (all_there, exactly, copied)  # pyright: ignore[reportArgumentType]
