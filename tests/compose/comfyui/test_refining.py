"""Subjects of an image are repainted one by one, and the rest of it stays."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_compose.compose.comfyui.concepts import NodeConcept, with_masks
from lora_compose.compose.comfyui.refining import refined

TEXT = "a sks cat and a zwx dog on grass"


def concepts(*boxes: str) -> list[NodeConcept]:
    cat = NodeConcept.of(Path("cat.safetensors"), "sks", "cat", 1.0, boxes[0])
    dog = NodeConcept.of(Path("dog.safetensors"), "zwx", "dog", 0.5, boxes[1])
    return [cat, NodeConcept.of(Path("style.safetensors"), "", "", 0.8), dog]


class Painter:
    """Paints everything white, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], str, torch.Size, Tensor]] = []

    def __call__(self, acting: Sequence[NodeConcept], text: str, part: Tensor, mask: Tensor) -> Tensor:
        assert not any(one.region is not None or one.scene.prompt for one in acting)
        self.asked.append(([Path(one.scene.name).stem for one in acting], text, part.shape, mask))
        return torch.ones_like(part)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 60, 100, 3)


def test_each_subject_is_painted_alone_at_the_size_with_the_styles(images: Tensor) -> None:
    painter = Painter()
    refined(images, concepts("0,0,0.2,0.5", "0.5,0,1,1"), TEXT, 128, painter)
    (first, second) = painter.asked
    assert first[:2] == (["cat", "style"], "a sks cat on grass")
    assert second[:2] == (["dog", "style"], "a zwx dog on grass")
    assert first[2] == (2, 128, 96, 3), "38 x 28 pixels: the box of 30 x 20 with a quarter of its longer side around it"
    assert second[2] == (2, 112, 128, 3), "60 x 65 pixels, since the image ends"
    assert first[3].shape == (128, 96)


def test_nothing_outside_of_the_subjects_changes_and_their_middle_is_repainted(images: Tensor) -> None:
    found = refined(images, concepts("0,0,0.2,0.5", ""), TEXT, 64, Painter())
    inside = torch.zeros(60, 100, dtype=torch.bool)
    inside[:30, :20] = True
    assert torch.equal(found[:, ~inside], images[:, ~inside])
    assert (found[:, 12:18, 8:12] == 1).all()
    border = found[:, 29, 10] - images[:, 29, 10]
    assert (border < 0.5 * (1 - images[:, 29, 10])).all(), "it fades"


def test_masks_are_in_the_order_of_the_concepts_and_styles_need_none(images: Tensor) -> None:
    masks = torch.zeros(3, 6, 10)
    masks[0, :, :4], masks[1], masks[2, :, 6:] = 1, 1, 1
    painter = Painter()
    refined(images, with_masks(concepts("", ""), masks), TEXT, 64, painter)
    assert [asked[0] for asked in painter.asked] == [["cat", "style"], ["dog", "style"]]


@pytest.mark.parametrize("given", [True, False])
def test_a_subject_without_a_lora_stays_as_it_is(images: Tensor, given: bool) -> None:
    """Also where a draft has found it, and where its words are not in the text."""
    cat, bird = concepts("", "")[0], NodeConcept.of(None, "", "bird", 1.0)
    masks, painter = torch.zeros(2, 6, 10), Painter()
    masks[0, :, :2], masks[1, :, 5:] = 1, 1
    after = refined(
        images, with_masks([cat, bird], masks), "a sks cat and a bird" if given else "a sks cat", 64, painter
    )
    assert [asked[:2] for asked in painter.asked] == [(["cat"], "a sks cat")]
    assert torch.equal(after[:, :, 40:], images[:, :, 40:])


def test_a_prompt_of_its_own_is_the_text_of_a_subject(images: Tensor) -> None:
    cat = NodeConcept.of(Path("cat.safetensors"), "sks", "cat", 1.0, "0,0,1,1", None, "a sks cat asleep")
    painter = Painter()
    refined(images, [cat], "two animals", 64, painter)
    assert painter.asked[0][1] == "a sks cat asleep"


def test_words_keep_their_weights_and_prompts_have_their_own(images: Tensor) -> None:
    cat, style, dog = concepts("0,0,0.2,0.5", "0.5,0,1,1")
    asleep = NodeConcept.of(Path("fox.safetensors"), "fxs", "fox", 1.0, "0,0,1,1", None, "a (fxs fox:0.9) asleep")
    painter = Painter()
    refined(images, [cat, style, dog, asleep], "a (sks cat:1.3) and a zwx dog on (grass:1.2)", 64, painter)
    assert [asked[1] for asked in painter.asked] == [
        "a (sks cat:1.3) on (grass:1.2)", "a zwx dog on (grass:1.2)", "a (fxs fox:0.9) asleep"
    ]  # fmt: skip


def test_what_cannot_be_repainted_is_refused(images: Tensor) -> None:
    painter = Painter()
    with pytest.raises(ValueError, match="not known where the subjects are: connect the masks of Draft preview"):
        refined(images, concepts("", ""), TEXT, 64, painter)
    bird = NodeConcept.of(None, "", "bird", 1.0, "0,0,1,1")
    with pytest.raises(ValueError, match=r"give the concepts boxes or masks; bird has no LoRA, and stays as it is"):
        refined(images, [*concepts("", ""), bird], TEXT, 64, painter)
    with pytest.raises(ValueError, match=r"no text can be made about dog.safetensors: write its trigger"):
        refined(images, concepts("0,0,1,1", "0,0,1,1"), "a sks cat", 64, painter)
    with pytest.raises(ValueError, match="there are 2 masks for 3 concepts"):
        with_masks(concepts("", ""), torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match=r"the mask of cat.safetensors is too thin"):
        refined(images, with_masks(concepts("", ""), torch.zeros(3, 8, 8)), TEXT, 64, painter)
    assert not painter.asked
