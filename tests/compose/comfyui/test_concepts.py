"""What people give in the nodes becomes gates, or an error that says what to do."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_stand_in import Clip
from lora_compose.attention import JointRegions, RegionAttention, Site
from lora_compose.compose.comfyui.composition import Acting, ComposedConcepts, Passes, Region
from lora_compose.compose.comfyui.concepts import (
    ComposeRequest,
    NodeConcept,
    boxes_of,
    chained,
    drawn,
    subjects_of,
    with_boxes,
)
from lora_compose.compose.comfyui.families import Family
from lora_compose.compose.comfyui.weights import read_weights
from lora_compose.compose.comfyui.words import METHODS
from lora_compose.compose.page.labels import METHOD_LABELS
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.methods import choose_method, name_of
from lora_compose.pipelines.methods.draft import Draft as DraftMethod
from lora_compose.pipelines.methods.gated_pass import token_mask_in
from lora_compose.pipelines.text.branches import branch_of

TEXT = "a sks cat and a zwx dog on grass"
PLAIN = "a sks cat and a dog on grass"
CAT, DOG = Path("cat.safetensors"), Path("dog.safetensors")
LAYERS = {"a": Site("text"), "b": Site("image"), "c": Site("image", level=1), "d": Site("row"), "e": Site("modulation")}

UNET = Family(LAYERS, {"b.attn2": Site("image", reads_text=True), "b.attn1": Site("image")}, ["b.attn2"])
JOINT = Family(LAYERS, {"c": Site("text", "image", level=1)}, ["c"])


class WordClip(Clip):
    """A CLIP stand-in that records the texts it has encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[tuple[str, tuple[int, ...]]] = []

    def encode(self, text: str, which: Any) -> list[list[Any]]:
        self.encoded.append((text, tuple(which)))
        return [[torch.ones(1, len(text.split()) + 2, 4), {"pooled_output": text}]]


def composed(
    concepts: Sequence[NodeConcept], text: str, method: str, *, texts: str = "auto", joint: bool = False
) -> tuple[ComposedConcepts, Any, WordClip]:
    clip = WordClip()
    request = ComposeRequest(concepts, [{}] * len(concepts), clip, clip.encode, text, texts, joint)
    return *request.composed(method), clip


def two(first: str = "", second: str = "") -> list[NodeConcept]:
    return [NodeConcept.of(CAT, "sks", "cat", 1.0, first), NodeConcept.of(DOG, "zwx", "dog", 0.5, second)]


def acting(
    plan: ComposedConcepts, ours: list[bool], grid: tuple[int, int], tokens: int, *images: Sequence[Region | None],
    family: Family = UNET, step: int = 0, isolated: bool = False,
) -> Acting:  # fmt: skip
    lengths = [text[0][0].shape[1] for text in plan.texts]
    passes = Passes.of(plan, family, grid, images or [plan.regions], lengths)
    return Acting(passes, torch.tensor(ours), grid, tokens, plan.weights_at(step, 4), isolated)


def test_the_methods_are_described_as_on_the_page() -> None:
    assert {name: METHOD_LABELS[name].sentence for name in METHODS} == METHODS


def test_regional_acts_in_boxes_on_our_rows_alone() -> None:
    plan = composed(two("0,0,0.5,1"), "a sks cat", "regional")[0]
    gates = acting(plan, [True, False], (2, 4), 7).gates
    assert gates.text.tolist() == [[[1.0, 0.5]], [[0.0, 0.0]]], "for all tokens"
    assert gates.image[0][0].tolist() == [[1, 0.5], [1, 0.5], [0, 0.5], [0, 0.5]] * 2
    assert gates.image[1].tolist() == [[[1, 0.5], [0, 0.5]], [[0, 0], [0, 0]]]
    assert gates.row.tolist() == [[1, 0.5], [0, 0]]
    assert gates.modulation is not None
    assert gates.modulation.tolist() == [[0, 0.5], [0, 0]], "a region has no part in what scales all cells alike"


def test_merge_acts_on_every_row() -> None:
    plan = composed(two(), "", "merge")[0]
    gates = acting(plan, [False, True], (2, 4), 7).gates
    assert gates.text.tolist() == [[[1, 0.5]]], "1 row stands for all"
    assert all(gate.tolist() == [[[1, 0.5]]] for gate in gates.image.values())


def test_a_small_box_does_not_vanish_on_a_coarse_grid() -> None:
    plan = composed(two("0.1,0.1,0.11,0.11"), "", "regional")[0]
    assert acting(plan, [True], (4, 4), 1).gates.image[1][0, :, 0].tolist() == [1, 0, 0, 0]


def test_boxes_are_given_to_concepts_in_their_order() -> None:
    placed = with_boxes(two(), boxes_of("0,0,0.5,1\n\nnone\n"))
    assert [concept.region for concept in placed] == [(0, 0, 500, 1000), None]
    assert drawn(placed).mean(dim=(1, 2)).tolist() == [0.5, 1]


def test_regions_are_shown_as_masks() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :16] = 1
    concepts = [*two("0,0,0.5,1"), NodeConcept.of(Path("bird.safetensors"), "", "bird", 1.0, "", mask)]
    shown = drawn(concepts)
    assert shown.shape == (3, 256, 256)
    assert shown.mean(dim=(1, 2)).tolist() == [0.5, 1, 0.25]
    assert shown[2, :64].all()


def test_a_schedule_is_the_weight_of_each_step() -> None:
    cat = NodeConcept.of(CAT, "sks", "cat", 0.3, "0,0,0.5,1", schedule=" 0:1..0.5:0.5 ")
    plan = composed([cat, two()[1]], "a sks cat", "regional")[0]
    assert plan.weights_at(0, 4) == (1, 0.5), "not the weight beside it"
    rows = [acting(plan, [True], (1, 2), 7, step=step).gates for step in range(4)]
    assert [gates.row[0].tolist() for gates in rows] == [[1, 0.5], [0.75, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert rows[1].image[0][0].tolist() == [[0.75, 0.5], [0, 0.5]]
    with pytest.raises(
        ValueError, match=r"the schedule of cat.safetensors: expected a valid number, a list of numbers"
    ):
        NodeConcept.of(CAT, "", "", 1.0, schedule="early")


def beside(box: str = "", noun: str = "dog") -> NodeConcept:
    """A subject without a LoRA."""
    return NodeConcept.of(None, "", noun, 1.0, box)


STYLE = NodeConcept.of(Path("style.safetensors"), "", "", 1.0)
OTHER, LOST = beside(), beside(noun="bird")


def given(*boxes: str, nouns: tuple[str, str] = ("cat", "dog"), style: bool = False) -> list[NodeConcept]:
    boxes = (*boxes, "", "")
    cat = NodeConcept.of(CAT, "sks", nouns[0], 1.0, boxes[0])
    return [cat, NodeConcept.of(DOG, "zwx", nouns[1], 0.5, boxes[1]), *([STYLE] if style else [])]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "concepts",
    [
        [*given()[:1], OTHER], [*given("0,0,0.5,1")[:1], OTHER], [*given()[:1], beside("0.5,0,1,1")],
        [*given("0,0,0.5,1")[:1], beside("0.5,0,1,1"), STYLE], [*given()[:1], LOST], [OTHER, STYLE],
        given(), given(style=True), given("0,0,0.5,1"), given("0,0,0.5,1", "0.5,0,1,1"),
        given("0,0,0.5,1", "0.5,0,1,1", style=True), given(nouns=("cat", "")), given("0,0,0.5,1", nouns=("cat", "")),
        given("0,0,0.5,1", "0.5,0,1,1", nouns=("", "")), given()[:1], given("0,0,0.5,1")[:1], [STYLE, STYLE],
    ],
)  # fmt: skip
@pytest.mark.parametrize("trained", [False, True])
def test_a_method_is_chosen_as_in_our_pipelines(
    concepts: list[NodeConcept], joint: bool, trained: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where these see the same concepts, of which some are styles."""
    kind = "tara" if trained else None
    for path in {one.path for one in concepts if one.path is not None}:
        save_file({"a": torch.zeros(1)}, tmp_path / path, {"method": "tara"} if trained else {})
    concepts = [one if one.path is None else replace(one, path=tmp_path / one.path) for one in concepts]
    caplog.set_level("INFO", "lora_compose")
    text, subjects = TEXT if any(one.path == tmp_path / DOG for one in concepts) else PLAIN, subjects_of(concepts)
    boxed = [{"region": (0, 0, 8, 8)} if one.region is not None else {} for one in concepts]
    roles = [
        {"role": "style" if i not in subjects else "bystander" if one.path is None else "subject"}
        for i, one in enumerate(concepts)
    ]
    same = [one.scene.model_copy(update={**b, **r}) for one, b, r in zip(concepts, boxed, roles, strict=True)]
    described: Any = [
        SimpleNamespace(concept=one, trained_with=None if one.is_bystander else kind, words=Words()) for one in same
    ]
    wanted = name_of(choose_method(described, [text]).method)[0]
    clip = WordClip()
    plan, conditioning = ComposeRequest(concepts, [{}] * len(concepts), clip, clip.encode, text, joint=joint).composed(
        "auto"
    )
    assert f"method: {wanted}, because " in caplog.text
    clip = WordClip()
    expected, other = ComposeRequest(concepts, [{}] * len(concepts), clip, clip.encode, text, joint=joint).composed(
        wanted
    )
    assert torch.equal(plan.words, expected.words)
    assert (plan.draft is None, plan.text_of_others) == (expected.draft is None, expected.text_of_others)
    assert conditioning[0][1] == other[0][1]


def test_in_tara_a_style_acts_on_all_words() -> None:
    plan = composed([*two(), STYLE], TEXT, "tara")[0]
    assert plan.words.sum(dim=0).tolist() == [1, 1, len(TEXT.split()) + 2]


@pytest.mark.parametrize("box", ["0,0,1", "0,0,0,1", "0.5,0,0.2,1", "0,0,2,1", "a,b,c,d", "nan,0,1,1", "inf,0,1,1"])
def test_a_box_that_is_none_is_refused(box: str) -> None:
    with pytest.raises(ValueError, match=r"for example 0,0\.1,0\.5,0\.9"):
        NodeConcept.of(CAT, "", "", 1.0, box)


@pytest.mark.parametrize(
    ("concepts", "method", "said"),
    [
        (two(), "regional", "give at least one a box or a mask"),
        ([NodeConcept.of(CAT, "sks", "cat", 1.0)], "draft", "two or more"),
        ([NodeConcept.of(CAT, "sks", "", 1.0), *two()[1:]], "draft", "class word of cat.safetensors"),
        ([NodeConcept.of(CAT, "sks", "cat", 1.0, prompt="a sks cat")], "tara", "tara reads one text"),
        (
            [*two("0,0,1,1")[:1], NodeConcept.of(DOG, "", "", 1.0, prompt="a dog")],
            "regional",
            "no region that reads it",
        ),
        (two("0,0,1,1"), "merge", "merge does not use boxes and masks"),
        ([NodeConcept.of(CAT, "", "cat", 1.0)], "tara", "needs a trigger for cat.safetensors"),
        ([NodeConcept.of(CAT, "", "a", 1.0), NodeConcept.of(DOG, "a", "", 1.0)], "tara", "needs a trigger for cat"),
        (
            [NodeConcept.of(name, "cat", "", 1.0) for name in (CAT, DOG)],
            "tara",
            "of cat.safetensors and dog.safetensors s",
        ),
        (two(), "tara", r"cat.safetensors: the words 'sks' are not in the text; .*: 'sks cat'"),
        (two(), "draft", "dog.safetensors: the words 'dog' are not in the text"),
    ],
)
def test_what_a_method_needs_is_said(concepts: list[NodeConcept], method: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        composed(concepts, "a cat", method)


def test_regions_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="has a box and a mask"):
        NodeConcept.of(CAT, "", "", 1.0, "0,0,1,1", torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="is empty"):
        NodeConcept.of(CAT, "", "", 1.0, "", torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="clear it there"):
        with_boxes(two("0,0,1,1"), [None, None])
    with pytest.raises(ValueError, match="1 boxes for 2 concepts"):
        with_boxes(two(), [None])


def test_a_draft_looks_for_class_words_in_the_text_without_triggers() -> None:
    style = NodeConcept.of(Path("style.safetensors"), "", "", 1.0)
    plan, conditioning, clip = composed([*two(), style], TEXT, "draft")
    assert clip.encoded == [(TEXT, (2,)), ("a cat and a dog on grass", (2,))], "with the text-encoder LoRA of the style"
    assert conditioning[0][1]["pooled_output"] == TEXT
    assert plan.draft is not None
    assert plan.draft.words.nonzero().tolist() == [[2, 0], [5, 1]]
    assert not plan.draft.strips
    assert plan.phrases is not None
    assert plan.phrases.nonzero().tolist() == [[2, 0], [3, 0], [6, 1], [7, 1]], "from the trigger to the class word"
    assert not plan.texts
    assert plan.tokens == len(TEXT.split()) + 2


def test_a_draft_keeps_given_regions_and_divides_the_rest() -> None:
    plan, *_ = composed(two("0,0,0.5,1"), TEXT, "draft", joint=True)
    assert plan.draft is not None
    cat, dog = plan.draft.divide(torch.rand(2, 2, 4), plan.regions, (4, 8))
    assert cat == (0, 0, 500, 1000)
    assert isinstance(dog, torch.Tensor)
    assert dog.tolist() == [[0.0] * 4 + [1.0] * 4] * 4
    everything, *_ = composed(two("0,0,0.5,1", "0.5,0,1,1"), TEXT, "draft")
    assert everything.draft is None, "there is nothing to find"


def test_the_bias_draws_cells_to_the_words_of_their_own_region() -> None:
    plan, *_ = composed(two(), TEXT, "draft")
    left = torch.tensor([[1.0, 0.0]])
    drawn = acting(plan, [False, True], (1, 2), 11, [left, 1 - left]).bias
    assert drawn is not None
    bias = drawn.scores()[0]
    cat, dog = [0, 0, 1, 1, 0, 0, -1, -1, 0, 0, 0], [0, 0, -1, -1, 0, 0, 1, 1, 0, 0, 0]
    assert bias.tolist() == [[[0] * 11] * 2, [cat, dog]]
    assert DraftMethod().bias == bias.max()
    repeated = acting(plan, [True], (1, 2), 22, [left, 1 - left]).bias
    assert repeated is not None
    assert repeated.scores()[0].tolist() == [[cat * 2, dog * 2]]


def test_a_draft_in_one_sequence_of_text_and_image_is_that_of_one_text() -> None:
    """The words of a subject are drawn in both directions, and LoRAs of others leave them, behind zeros too."""
    cats, style = [NodeConcept.of(path, word, "cat", 1.0) for path, word in ((CAT, "sks"), (DOG, "zwx"))], STYLE
    plan, _, clip = composed([*cats, style], "a sks cat and a zwx cat", "draft", joint=True)
    assert [text for text, _ in clip.encoded] == ["a sks cat and a zwx cat", "a cat and a cat"]
    model: Any = SimpleNamespace(backbone=SimpleNamespace(joint=JOINT.joint))
    assert plan.isolate == DraftMethod().isolate_in(model) > 0
    assert token_mask_in(model, DraftMethod().token_mask) == "others"
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])
    images = [[first, 1 - first, None], [second, 1 - second, None]]
    family = replace(JOINT, zeros="before")
    here = acting(plan, [True, True, False, False], (2, 6), 10, *images, family=family, isolated=True)
    own = [[0, 0, 0, 1, 1, 0, 0, -1, -1, 0], [0, 0, 0, -1, -1, 0, 0, 1, 1, 0]]
    assert here.bias is not None
    assert here.bias.scores()[1].tolist() == [[own[0], own[1], own[1]], [own[0], own[0], own[1]], *[[[0] * 10] * 3] * 2]
    gates = here.gates.text
    assert gates[0].t().tolist() == [[float(value >= 0) for value in row] for row in own] + [[1] * 10]
    assert torch.equal(gates[1], gates[0])
    assert not gates[2:].any()
    assert acting(plan, [True] * 2, (2, 6), 10, *images, family=family).regions(torch.device("cpu")) == (None, None)


@pytest.mark.parametrize("texts", ["auto", "shared", "regions"])
def test_boxes_in_one_sequence_of_text_and_image_are_isolated_at_first(texts: str) -> None:
    """And where all read one text, LoRAs leave the words of others, those of a subject without a LoRA too."""
    concepts = [*with_boxes([two()[0], beside()], boxes_of("0,0,0.5,1\n0.5,0,1,1")), STYLE]
    plan = composed(concepts, "a sks cat and a dog", "regional", texts=texts, joint=True)[0]
    model: Any = SimpleNamespace(backbone=SimpleNamespace(joint=JOINT.joint))
    assert (plan.isolate, plan.owners) == (DraftMethod().isolate_in(model), [0, 1])
    assert plan.phrases is None, "no bias"
    if texts == "regions":
        assert plan.kept is None
        return
    left = torch.tensor([[1.0, 0.0]])
    gates = acting(plan, [True, False], (1, 2), 8, [left, 1 - left, None], family=replace(JOINT, zeros="after")).gates
    assert gates.text[0].t().tolist() == [[1, 1, 1, 1, 1, 1, 0, 1], [0] * 8, [1] * 8]
    assert not gates.text[1].any()
    alone = composed(two("0,0,0.5,1")[:1], TEXT, "regional", texts=texts, joint=True)[0]
    assert (alone.isolate, alone.kept) == (0, None)
    one_box = composed(two("0,0,0.5,1"), TEXT, "regional", texts=texts, joint=True)[0]
    assert one_box.isolate == 0
    assert one_box.kept is not None, "the other acts everywhere, but not on these words"
    assert one_box.kept.nonzero().tolist() == [[2, 1], [3, 1], [6, 0], [7, 0]]


def test_images_of_a_batch_are_isolated_by_regions_of_their_own() -> None:
    """Against a mask of positions."""
    plan, *_ = composed(two(), TEXT, "draft", joint=True)
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])
    images = [[first, 1 - first], [second, 1 - second]]
    tokens, ours = len(TEXT.split()) + 2, [False, False, True, True]
    regions = acting(plan, ours, (2, 6), tokens, *images, family=JOINT, isolated=True).regions(torch.device("cpu"))[1]
    assert regions is not None
    seen = torch.ones(4, 1, tokens + 3, tokens + 3, dtype=torch.bool)
    for row, left in ((2, 1), (3, 2)):
        seen[row, 0, tokens : tokens + left, tokens + left :] = False
        seen[row, 0, tokens + left :, tokens : tokens + left] = False

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    q, k, v = torch.randn(3, 4, tokens + 3, 2, 4, generator=torch.Generator().manual_seed(0))
    found = regions.attend(attend, ("text", "image"), q, k, v, None)
    torch.testing.assert_close(found, attend(q, k, v, seen), atol=1e-6, rtol=0)


def test_two_of_one_class_are_looked_for_by_the_same_word_and_read_one_text() -> None:
    cats = [NodeConcept.of(CAT, "sks", "cat", 1.0), NodeConcept.of(DOG, "zwx", "cat", 1.0)]
    plan, _, clip = composed(cats, "a sks cat and a zwx cat on grass", "draft")
    assert [text for text, _ in clip.encoded] == ["a sks cat and a zwx cat on grass", "a cat and a cat on grass"]
    assert not plan.texts
    assert not plan.isolate
    assert plan.draft is not None
    assert not plan.draft.strips
    assert plan.draft.words.nonzero().tolist() == [[2, 0], [5, 1]]
    assert plan.phrases is not None
    assert plan.phrases.nonzero().tolist() == [[2, 0], [3, 0], [6, 1], [7, 1]]


def test_two_of_one_class_may_read_texts_of_their_own() -> None:
    cats = [NodeConcept.of(CAT, "sks", "cat", 1.0), NodeConcept.of(DOG, "zwx", "cat", 1.0)]
    plan, conditioning, clip = composed(cats, "a sks cat and a zwx cat on grass", "draft", texts="regions")
    said = [text for text, _ in clip.encoded]
    assert said[:3] == ["on grass", "a sks cat on grass", "a zwx cat on grass"]
    assert [which for _, which in clip.encoded[:3]] == [(), (0,), (1,)]
    assert [text[0][0].shape[1] for text in plan.texts] == [4, 7, 7]
    assert plan.isolate
    assert plan.draft is not None
    assert plan.draft.strips
    assert conditioning[0][1]["pooled_output"] == "a cat and a cat on grass", "that of the whole image"
    assert plan.whole is conditioning
    assert plan.words.tolist() == [[0, 0], [1, 0], [0, 1]]
    masks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    text = acting(plan, [True, False], (1, 2), 36, masks).gates.text
    assert text[1].sum() == 0
    assert text[0, :18].nonzero().tolist() == [[n, 0] for n in range(4, 11)] + [[n, 1] for n in range(11, 18)]
    assert torch.equal(text[0, :18], text[0, 18:]), "repeated as ComfyUI does it"


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        (
            "a (sks cat:1.3) and a zwx dog on grass",
            ["on grass", "a (sks cat:1.3) on grass", "a zwx dog on grass", "a (cat:1.3) and a dog on grass"],
        ),
        (
            "a sks cat and a (zwx dog:1.2), (masterpiece:1.1)",
            [
                "(masterpiece)", "a sks cat, (masterpiece)", "a (zwx dog:1.2), (masterpiece)",
                "a cat and a (dog:1.2), (masterpiece)",
            ],
        ),
        (
            "(a (sks:1.2) cat and a zwx dog) \\(film\\)",
            [
                "\\(film\\)", "(a) (sks:1.2) (cat) \\(film\\)", "(a zwx dog) \\(film\\)",
                "(a cat and a dog) \\(film\\)",
            ],
        ),
    ],
)  # fmt: skip
def test_texts_that_are_derived_keep_the_weights_of_their_words(text: str, encoded: list[str]) -> None:
    placed = with_boxes(two(), boxes_of("0,0,0.5,1\n0.5,0,1,1"))
    clip = composed(placed, text, "regional", texts="regions")[2]
    assert [said for said, _ in clip.encoded] == encoded


def test_a_draft_finds_words_beside_weights() -> None:
    text = "a (sks:1.2) cat and a (zwx dog:0.8)"
    plan, _, clip = composed(two(), text, "draft")
    assert [said for said, _ in clip.encoded] == [text, "a cat and a (dog:0.8)"]
    assert plan.draft is not None
    assert plan.phrases is not None
    assert plan.draft.words.nonzero().tolist() == [[2, 0], [5, 1]]
    assert plan.phrases.nonzero().tolist() == [[2, 0], [3, 0], [6, 1], [7, 1]]


@pytest.mark.parametrize(
    ("text", "plain", "weights"),
    [
        ("a (b:2) c", "a b c", [1, 1, 2, 1, 1]),
        ("(a) \\(b\\)", "a \\(b\\)", [1.1] + [1] * 6),
        ("((a) b:2)", "a b", [2.2, 2, 2]),
        ("((a:3) b:2)", "a b", [3, 2, 2]),
        ("(16:9) )(", "16 )(", [9, 9, 1, 1, 1]),
        ("(a: b)", "a: b", [1.1] * 4),
    ],
)
def test_weights_are_read_as_comfyui_reads_them(text: str, plain: str, weights: list[float]) -> None:
    read = read_weights(text)
    assert read.text == plain
    assert read.weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("texts", "joint", "prompt", "own"),
    [
        ("auto", False, "", False),
        ("auto", True, "", False),
        ("auto", True, "a sks cat asleep", True),
        ("auto", False, "a sks cat asleep", True),
        ("shared", True, "", False),
        ("regions", False, "", True),
    ],
)
def test_regions_read_texts_of_their_own_where_that_is_wanted(texts: str, joint: bool, prompt: str, own: bool) -> None:
    cat = NodeConcept.of(CAT, "sks", "cat", 1.0, "0,0,0.5,1", prompt=prompt)
    plan, _, clip = composed([cat, two("", "0.4,0,1,1")[1]], TEXT, "regional", texts=texts, joint=joint)
    assert bool(plan.texts) == own
    if not own:
        assert clip.encoded == [(TEXT, ())]
        return
    assert clip.encoded[0][0] == ("a cat and a dog on grass" if joint else "on grass")
    assert clip.encoded[1][0] == (prompt or "a sks cat on grass")
    family, cpu = JOINT if joint else UNET, torch.device("cpu")
    found = acting(plan, [True], (2, 4), 27, family=family).regions(cpu)
    assert isinstance(found[joint], JointRegions if joint else RegionAttention)
    others = acting(plan, [False], (2, 4), 5, family=family)
    assert others.regions(cpu) == (None, None)
    assert others.gates.read is None, "they are not asked for each region"


def test_where_an_adapter_makes_the_text_its_tokens_count() -> None:
    """Anima's, of the words of another tokenizer."""
    clip = WordClip()

    def encode(text: str, which: Any) -> list[list[Any]]:
        ((tensor, options),) = clip.encode(text, which)
        return [[tensor, {**options, "t5xxl_ids": torch.zeros(3)}]]

    placed = with_boxes(two(), boxes_of("0,0,0.5,1\n0.5,0,1,1"))
    plan, conditioning = ComposeRequest(placed, [{}, {}], clip, encode, TEXT, "regions").composed("regional")
    assert [len(text[0][1]["t5xxl_ids"]) for text in plan.texts] == [3, 3, 3]
    assert plan.tokens == 3
    assert conditioning[0][0].shape[1] == 7 + 2, "of the whole text"


@pytest.mark.parametrize(
    ("zeros", "where"), [("before", [[4, 0], [5, 0]]), ("behind", [[1, 0], [2, 0]]), (None, [[1, 0], [2, 0]])]
)
def test_words_stay_where_they_are_in_a_text_that_is_filled_up(zeros: Any, where: list[list[int]]) -> None:
    family = replace(UNET, zeros=zeros)
    plan = composed([NodeConcept.of(CAT, "sks cat", "", 1.0)], "sks cat asleep", "tara")[0]
    text = acting(plan, [True], (2, 4), 5 if zeros is None else 8, family=family).gates.text
    assert text[0].nonzero().tolist() == where


def test_texts_that_cannot_be_made_or_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no text can be made about cat\.safetensors: write its trigger"):
        composed(two("0,0,0.5,1"), "a zwx dog", "regional", texts="regions")
    asleep = NodeConcept.of(CAT, "sks", "cat", 1.0, "0,0,0.5,1", prompt="a sks cat asleep")
    with pytest.raises(ValueError, match="all regions read one text; clear it, or set texts to regions"):
        composed([asleep], TEXT, "regional", texts="shared")


def test_loras_keep_off_the_box_of_a_subject_without_one() -> None:
    """The gates are those of a LoRA in that box whose weight is 0."""
    cat, boxes = two("0,0,0.5,1")[0], "0.5,0,1,1"
    plans = [
        composed([cat, other], PLAIN, "regional")[0]
        for other in (beside(boxes), NodeConcept.of(DOG, "", "dog", 0, boxes))
    ]
    ours, weightless = (acting(plan, [True, False], (2, 4), 9) for plan in plans)
    assert ours.gates.image[0][0].tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]] * 2
    assert all(torch.equal(ours.gates.image[level], weightless.gates.image[level]) for level in (0, 1))
    assert torch.equal(ours.gates.text, weightless.gates.text)
    read = composed([cat, beside(boxes)], PLAIN, "regional", texts="regions", joint=True)[2].encoded
    assert [text for text, _ in read][:3] == ["a cat and a dog on grass", "a sks cat on grass", "a dog on grass"]


def test_a_lora_without_a_region_is_said_to_act_in_that_of_a_subject_without_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    composed([two()[0], beside("0.5,0,1,1")], PLAIN, "regional")
    assert (
        "without a box or mask, cat.safetensors acts on the whole image, also in the regions of others" in caplog.text
    )
    caplog.clear()
    composed([two("0,0,0.5,1")[0], beside("0.5,0,1,1"), STYLE], PLAIN, "regional")
    assert not caplog.text


@pytest.mark.parametrize("method", ["merge", "tara"])
def test_methods_without_places_make_the_image_without_a_subject_that_has_no_lora(method: str) -> None:
    """The words of "cat" are those of the trigger alone, and those of the other cat are not looked for."""
    plan, conditioning, _ = composed([two()[0], beside(noun="cat")], "a sks cat and a cat", method)
    alone, same, _ = composed([two()[0]], "a sks cat and a cat", method)
    assert torch.equal(plan.words[:, :1], alone.words)
    assert torch.equal(conditioning[0][0], same[0][0])
    assert (plan.weights_at(0, 4), plan.loras[1]) == ((1, 0), {})
    assert (plan.text_of_others, plan.image_of_others) == (alone.text_of_others, alone.image_of_others)


def test_a_draft_finds_a_subject_without_a_lora_by_the_class_word_that_follows_no_trigger() -> None:
    """As the masks of tokens of our pipelines do."""
    cat, text = two()[0], "a cat beside a sks cat on (grass:1.2)"
    plan, _, clip = composed([cat, beside(noun="cat")], text, "draft")
    assert [said for said, _ in clip.encoded] == [
        "on (grass:1.2)", "a sks cat on (grass:1.2)", "a cat on (grass:1.2)", "a cat beside a cat on (grass:1.2)",
        "a cat beside a cat on (grass:1.2)",
    ]  # fmt: skip
    assert plan.draft is not None
    assert plan.draft.words.nonzero().tolist() == [[2, 1], [5, 0]]
    both = [cat.scene, beside(noun="cat").scene]
    base = branch_of(None, ["a cat beside a sks cat on grass"], both, [0, 1])
    assert base.prompts == ("a cat beside a cat on grass",)
    assert [base.mentions[0][scene.name].which for scene in both] == [(1,), (0,)]
    masks = plan.draft.divide(torch.rand(2, 4, 8), plan.regions, (4, 8))
    assert all(isinstance(mask, torch.Tensor) and mask.any() for mask in masks)


def test_the_words_of_a_subject_without_a_lora_are_its_own_where_all_read_one_text() -> None:
    man, text = NodeConcept.of(CAT, "sks", "man", 1.0), "an old man beside a sks man on grass"
    plan, _, clip = composed([man, beside(noun="old man")], text, "draft", texts="shared")
    assert [said for said, _ in clip.encoded] == [text, "an old man beside a man on grass"]
    assert plan.draft is not None
    assert plan.phrases is not None
    assert plan.draft.words[:, 1].nonzero()[:, 0].tolist() == [2, 3]
    assert plan.phrases.nonzero().tolist() == [[2, 1], [3, 1], [6, 0], [7, 0]]
    plan, *_ = composed([man, beside(noun="man")], "a man beside a sks man on grass", "draft", texts="shared")
    assert plan.phrases is not None
    assert plan.phrases.nonzero().tolist() == [[2, 1], [5, 0], [6, 0]]


def in_a_chain(*concepts: NodeConcept) -> Sequence[NodeConcept]:
    return reduce(chained, concepts, ())


def test_subjects_of_one_class_word_without_a_lora_have_one_of_its_places_each() -> None:
    sks = NodeConcept.of(CAT, "sks", "woman", 1.0)
    every = in_a_chain(sks, *[beside(noun="woman")] * 3)
    assert [one.scene.name for one in every] == ["cat.safetensors", "woman", "woman (2)", "woman (3)"]
    plan, *_ = composed(every[:3], "a sks woman beside a woman and a woman", "draft")
    assert plan.draft is not None
    assert plan.draft.words.nonzero().tolist() == [[2, 0], [5, 1], [8, 2]]


def test_files_of_one_name_in_two_folders_have_triggers_of_their_own() -> None:
    """As two files with names of their own: the cat belongs to zwx."""
    text = "a portrait of sks, and a zwx cat on grass"
    sks = NodeConcept.of(CAT, "sks", "cat", 1.0)
    other, named = (in_a_chain(sks, NodeConcept.of(path, "zwx", "cat", 1.0)) for path in (DOG, Path("zwx", CAT)))
    said = [composed(concepts, text, "draft", texts="regions")[2].encoded for concepts in (named, other)]
    assert said[0] == said[1]
    assert "a portrait of sks on grass" in [text for text, _ in said[0]]
    with pytest.raises(ValueError, match=r"no text can be made about cat\.safetensors \(2\): write its trigger"):
        composed(with_boxes(named, boxes_of("0,0,0.5,1\n0.5,0,1,1")), "a sks cat", "regional", texts="regions")


@pytest.mark.parametrize("texts", ["shared", "regions"])
def test_a_subject_without_a_lora_that_the_text_does_not_name_is_asked_for(texts: str) -> None:
    said = "the text has no 'cat' that follows no trigger; write it where the subject without a LoRA is meant"
    with pytest.raises(ValueError, match=said):
        composed([two()[0], beside(noun="cat")], "a sks cat on grass", "draft", texts=texts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither a LoRA nor a class word: choose a file, or type what the subject without a LoRA is"),
        ({"trigger": "sks"}, "the Concept with the trigger 'sks' has no LoRA: choose its file, or clear the trigger"),
        ({"trigger": "sks", "class_word": "cat"}, "a subject without a LoRA has a class word alone"),
        ({"class_word": "cat", "weight": 0.8}, "the subject 'cat' has a weight, but no LoRA .* set it to 1, or choose"),
        ({"class_word": "cat", "schedule": "1..0"}, "'cat' has a schedule, but no LoRA that it would change: clear it"),
        ({"class_word": "cat", "box": "0,0,1,1", "mask": torch.ones(1, 4, 4)}, "cat has a box and a mask"),
    ],
)
def test_what_a_subject_without_a_lora_lacks_or_has_too_much_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NodeConcept.of(None, **{"trigger": "", "class_word": "", "weight": 1.0, **given})
