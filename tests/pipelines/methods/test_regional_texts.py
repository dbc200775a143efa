"""On transformers each region reads a text of its own: equal to dense attention masks and dense deltas."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from all_transformers import FEW, JOINT, TRANSFORMERS
from chroma import CHROMA
from components import lora_tensors, random_lora, seeded, tiny_pipeline
from flux import FLUX
from flux2 import FLUX2
from flux3 import FLUX3
from ideogram4 import IDEOGRAM4
from krea2 import KREA2
from lora_compose import Concept, Draft, Regional
from lora_compose.attention import backbone_of
from lora_compose.attention.joint_regions import seen_too
from pairs import in_pairs, slow_but
from qwen_image import QWEN_IMAGE
from transformer_families import (
    CELLS,
    TOKENS,
    Family,
    Places,
    as_file,
    dense_loras,
    last_layer,
    random_lora_of_all,
    shared_pipeline,
)
from z_image import Z_IMAGE

PROMPT = "a sks cat and a zwx dog on grass"
TEXTS = ("a cat and a dog on grass", "a sks cat on grass", "a zwx dog on grass")
LEFT, MIDDLE, RIGHT = (0, 0, 64, 160), (32, 0, 96, 160), (64, 0, 128, 160)
ROWS = 10  # of image tokens
IMAGE = ROWS * CELLS
CALL: dict[str, Any] = {
    "prompt": PROMPT, "width": 128, "height": 160, "num_inference_steps": 1, "max_sequence_length": TOKENS,
    "output_type": "latent",
}  # fmt: skip
OWN_TEXTS = Regional(texts="regions", isolate=0)
BOXES = {"apart": (LEFT, RIGHT), "overlapping": (LEFT, MIDDLE)}


@pytest.fixture(params=JOINT, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return TRANSFORMERS[request.param]


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return shared_pipeline(family)


def concepts(boxes: str) -> list[Concept]:
    return [Concept(name=name, region=box) for name, box in zip(("cat", "dog"), BOXES[boxes], strict=True)]


def inside(box: tuple[int, int, int, int]) -> Tensor:
    """Which cells a box covers, one after the other."""
    cells = torch.zeros(ROWS, CELLS, dtype=torch.bool)
    cells[box[1] // 16 : box[3] // 16, box[0] // 16 : box[2] // 16] = True
    return cells.flatten()


@contextmanager
def observed(transformer: Any) -> Iterator[list[tuple[tuple, dict[str, Any], Any]]]:
    """What the transformer is given and gives."""
    calls: list[tuple[tuple, dict[str, Any], Any]] = []
    hook = transformer.register_forward_hook(
        lambda _, given, named, output: calls.append((given, named, output)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def texts_of(family: Family, pipe: Any) -> list[int]:
    """Tokens of each text, counted with the pipeline's own tokenizer; with padding where the model reads it."""
    if family is FLUX:
        return [TOKENS, *(len(pipe.tokenizer_2(text).input_ids) for text in TEXTS[1:])]
    if family is CHROMA:  # which reads the first token of the padding
        return [TOKENS, *(len(pipe.tokenizer(text).input_ids) + 1 for text in TEXTS[1:])]
    if family is FLUX3:  # which reads padding
        return [TOKENS] * len(TEXTS)
    template = pipe._template(TOKENS)
    real = [len(pipe.tokenizer(template.render(text)).input_ids) - template.dropped for text in TEXTS]
    if family is KREA2:
        real = [length + 5 for length in real]  # the end of the template
    return [TOKENS if family is FLUX2 else real[0], *real[1:]]


def padding_of(family: Family, positions: int) -> int:
    """Z-Image pads texts and images to multiples of 32."""
    return -positions % 32 if family is Z_IMAGE else 0


def sees(family: Family, boxes: Sequence[Tensor], lengths: Sequence[int], *, isolate: bool) -> Tensor:
    """Which position attends to which. Shape: [positions, positions]."""
    text = [("text", {n}) for n, length in enumerate(lengths) for _ in range(length)]
    image = [("image", {n for n, box in enumerate(boxes, 1) if box[cell]}) for cell in range(len(boxes[0]))]
    text += [("text", {0})] * padding_of(family, len(text))
    image += [("image", set())] * padding_of(family, len(image))
    positions = image + text if family is Z_IMAGE else text + image
    allowed = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for i, (kind, mine) in enumerate(positions):
        for j, (other, theirs) in enumerate(positions):
            shared = bool(mine & theirs)
            if kind == other == "image":
                allowed[i, j] = shared or not isolate or not mine or not theirs
            elif kind == other:
                allowed[i, j] = shared
            else:
                allowed[i, j] = shared or 0 in mine | theirs
    return allowed


@contextmanager
def densely(masks: dict[int, Tensor]) -> Iterator[None]:
    """Attention with a mask of positions x positions, by how many positions there are."""
    found: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        dense = masks.get(query.shape[-2])
        if dense is not None:
            attn_mask = dense if attn_mask is None else seen_too(attn_mask, dense)
        return found(query, key, value, attn_mask=attn_mask, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield


def placed(family: Family, boxes: Sequence[Tensor], lengths: Sequence[int]) -> Places:
    """The second and the third text and their cells are the concepts' own."""
    text = torch.zeros(1, sum(lengths) + padding_of(family, sum(lengths)), 2)
    text[:, lengths[0] : sum(lengths[:2]), 0] = text[:, sum(lengths[:2]) : sum(lengths), 1] = 1
    cells = len(boxes[0])
    image = torch.zeros(1, cells + padding_of(family, cells), 2)
    image[0, :cells] = torch.stack(list(boxes), dim=-1).float()
    return Places(text, image, torch.zeros(1, 2))


PLACES = [("apart", False), ("overlapping", True), ("overlapping", False), ("apart", True)]


@pytest.mark.parametrize(
    ("family", "boxes", "isolate"),
    in_pairs(slow_but({*JOINT} - {"chroma", "krea2"}, JOINT), PLACES),
    indirect=["family"],
)
def test_a_pass_equals_dense_masks_and_dense_deltas(family, pipe, boxes, isolate):
    method = Regional(texts="regions", isolate=isolate)
    with observed(pipe.transformer) as calls:
        pipe(**CALL, **family.unguided, concepts=concepts(boxes), method=method, generator=seeded(3))
    check_pass(family, pipe, calls[0], [inside(box) for box in BOXES[boxes]], isolate=isolate)


@pytest.mark.parametrize("family", slow_but(["flux", "qwen-image"], JOINT), indirect=True)
def test_regions_are_isolated_in_a_part_of_the_steps_from_the_first(family, pipe):
    method, mine = Regional(texts="regions", isolate=0.5), [inside(box) for box in BOXES["apart"]]
    with observed(pipe.transformer) as calls:
        steps = {**CALL, "num_inference_steps": 2}
        pipe(**steps, **family.unguided, concepts=concepts("apart"), method=method, generator=seeded(3))
    for call, isolated in zip(calls, (True, False), strict=True):
        check_pass(family, pipe, call, mine, isolate=isolated)


@pytest.mark.parametrize("isolate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_reference_image_has_the_regions_of_the_image(isolate):
    pipe, image = shared_pipeline(FLUX2), torch.rand(3, 160, 128, generator=seeded(0))
    start = {"image": image, "mask_image": (0, 0, 128, 160), "strength": 1.0}
    method = Regional(texts="regions", isolate=isolate)
    with observed(pipe.transformer) as calls:
        pipe(**CALL, **FLUX2.unguided, **start, concepts=concepts("overlapping"), method=method)
    twice = [inside(box).repeat(2) for box in BOXES["overlapping"]]
    check_pass(FLUX2, pipe, calls[0], twice, isolate=isolate)


@contextmanager
def each_from_its_start(family: Family, transformer: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Qwen-Image counts positions by itself: those of each text are to begin at the first."""
    if family is not QWEN_IMAGE:
        yield
        return
    positions = torch.cat([torch.arange(length) for length in lengths])
    hook = transformer.pos_embed.register_forward_hook(lambda _, given, found: (found[0], found[1][positions]))
    try:
        yield
    finally:
        hook.remove()


def test_reference_images_of_other_sizes_lie_in_no_region():
    pipe = shared_pipeline(FLUX2)
    images = [Image.new("RGB", size, colour) for size, colour in (((64, 96), "navy"), ((80, 64), "orange"))]
    method = Regional(texts="regions", isolate=True)
    with observed(pipe.transformer) as calls:
        pipe(**CALL, **FLUX2.unguided, image=images, concepts=concepts("overlapping"), method=method)
    elsewhere = torch.zeros(4 * 6 + 5 * 4, dtype=torch.bool)
    mine = [torch.cat([inside(box), elsewhere]) for box in BOXES["overlapping"]]
    check_pass(FLUX2, pipe, calls[0], mine, isolate=True)


def check_pass(family: Family, pipe: Any, call: tuple, mine: Sequence[Tensor], *, isolate: bool) -> None:
    """A pass equals one with dense masks and dense deltas; whose cells are whose is told for each region."""
    (given, named, found), lengths = call, texts_of(family, pipe)
    whole = sees(family, mine, lengths, isolate=isolate)
    tokens = sum(lengths) + padding_of(family, sum(lengths))
    masks = {len(whole): whole}
    masks[tokens] = whole[-tokens:, -tokens:] if family is Z_IMAGE else whole[:tokens, :tokens]
    if family is Z_IMAGE and isolate:
        masks[len(whole) - tokens] = whole[:-tokens, :-tokens]
    if family is FLUX3 and isolate:
        masks[len(whole) - tokens] = whole[tokens:, tokens:]
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    places = placed(family, mine, lengths)
    with (
        densely(masks), each_from_its_start(family, pipe.transformer, lengths),
        dense_loras(family, pipe.transformer, loras, lambda _: places, guided=False), torch.no_grad(),
    ):  # fmt: skip
        expected = pipe.transformer(*given, **named)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", slow_but(FEW, JOINT), indirect=True)
def test_each_text_is_encoded_apart_and_begins_at_its_own_first_position(family, pipe):
    with observed(pipe.transformer) as calls:
        pipe(**CALL, **family.unguided, concepts=concepts("apart"), method=OWN_TEXTS)
    given, named, _ = calls[0]
    text = given[2][0] if family is Z_IMAGE else named["encoder_hidden_states"][0]
    lengths, start = texts_of(family, pipe), 0
    for prompt, length in zip(TEXTS, lengths, strict=True):
        with observed(pipe.transformer) as alone:
            pipe(**{**CALL, **family.unguided, "prompt": prompt})
        given, named, _ = alone[0]
        whole = given[2][0] if family is Z_IMAGE else named["encoder_hidden_states"][0]
        if family is IDEOGRAM4:  # whose text is padded before it in diffusers, and as long as the whole sequence
            real = len(pipe.tokenizer(pipe._template(TOKENS).render(prompt)).input_ids)
            text, whole = text[: sum(lengths)], torch.cat([whole[TOKENS - real : TOKENS], whole[: TOKENS - real]])
        if family is KREA2 and length < TOKENS:
            whole = whole[named["encoder_attention_mask"][0]]
        found = text[start : start + min(length, len(whole))]  # diffusers does not pad all of them
        torch.testing.assert_close(found, whole[:length], atol=1e-6, rtol=0)
        start += length


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_texts_of_subjects_leave_the_scene_out(family, pipe):
    own = [
        one.model_copy(update={"prompt": text})
        for one, text in zip(concepts("apart"), ("a sks cat", "a zwx dog"), strict=True)
    ]
    given = {**CALL, **family.unguided}
    found = pipe(**given, concepts=concepts("apart"), method=Regional(texts="subjects"), generator=seeded(3)).images
    assert torch.equal(found, pipe(**given, concepts=own, method="regional", generator=seeded(3)).images)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
@pytest.mark.parametrize("method", [Regional, Draft])
def test_with_the_surroundings_no_cell_reads_of_a_subject_elsewhere(family, pipe, method):
    settings: Any = {"texts" if method is Regional else "reading": "subjects", "background": "surroundings"}
    with observed(pipe.transformer) as calls:
        pipe(**CALL, **family.unguided, concepts=concepts("apart"), method=method(**settings))
        pipe(**CALL, **family.unguided, concepts=concepts("apart"), method=OWN_TEXTS)
    (_, ours, _), (_, scene, _) = calls
    read, start = ours["encoder_hidden_states"][0], 0
    for text in ("on grass", "a sks cat", "a zwx dog"):
        with observed(pipe.transformer) as alone:
            pipe(**{**CALL, **family.unguided, "prompt": text})
        tokens = TOKENS if start == 0 else len(pipe.tokenizer_2(text).input_ids)
        whole = alone[0][1]["encoder_hidden_states"][0]
        torch.testing.assert_close(read[start : start + tokens], whole[:tokens], atol=1e-6, rtol=0)
        start += tokens
    assert start == len(read)
    assert torch.equal(ours["pooled_projections"], scene["pooled_projections"])


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_regions_that_read_one_text_are_isolated_in_a_part_of_the_steps(family, pipe):
    """With a draft whose bias is 0 that is the same, which is compared with dense masks."""
    given = {**CALL, **family.unguided, "num_inference_steps": 2, "concepts": concepts("apart")}
    methods = (Regional(isolate=0.5), Draft(reading="scene", isolate=0.5, bias=0))
    found, same = (pipe(**given, method=method, generator=seeded(3)).images for method in methods)
    assert torch.equal(found, same)
    for isolate in (0, 1):
        other = pipe(**given, method=Regional(isolate=isolate), generator=seeded(3)).images
        assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", slow_but((*FEW, "ideogram4"), JOINT), indirect=True)
def test_unconditional_rows_are_those_of_the_base_model(family, pipe):
    network = pipe.unconditional_transformer if family.two_networks else pipe.transformer
    seen: list[Tensor] = []
    hook = last_layer(network).register_forward_hook(lambda _, __, output: seen.append(output[:1]))
    guided = {**family.guided, "generator": seeded(3)}
    try:
        pipe(**CALL, **guided, concepts=concepts("apart"), method="regional")
        guided["generator"] = seeded(3)
        pipe(**CALL, **guided, concepts=[Concept(name="cat", weight=0.0)], method="merge")
    finally:
        hook.remove()
    ours, base = (found[:, :IMAGE] if family is Z_IMAGE else found[:, -IMAGE:] for found in seen)
    torch.testing.assert_close(ours, base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", slow_but(["z-image"], JOINT), indirect=True)
@pytest.mark.parametrize("method", [OWN_TEXTS, Regional()], ids=["texts of regions", "one text"])
def test_prompts_of_different_lengths_give_the_images_of_separate_calls(family, pipe, method):
    prompts = [PROMPT, "a sks cat in the photo of a zwx dog and a cat on the grass"]
    noise = torch.randn(2, 4, 20, 16, generator=seeded(1))
    given = {**CALL, **family.guided, "concepts": concepts("apart"), "method": method}
    both = pipe(**{**given, "prompt": prompts, "latents": noise}).images
    for i, prompt in enumerate(prompts):
        alone = pipe(**{**given, "prompt": prompt, "latents": noise[i : i + 1]}).images
        torch.testing.assert_close(both[i : i + 1], alone, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", ["ideogram4", "krea2", "qwen-image"], indirect=True)
def test_padding_that_the_model_hides_is_not_run_and_changes_nothing(family, pipe, monkeypatch):
    given = {**CALL, **family.guided, "concepts": concepts("apart"), "method": OWN_TEXTS}
    with observed(pipe.transformer) as calls:
        found = pipe(**given, generator=seeded(3)).images
        monkeypatch.setattr(type(backbone_of(pipe.transformer)), "hides_padding", False)
        padded = pipe(**given, generator=seeded(3)).images
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=0)
    tokens, with_padding = (named["encoder_hidden_states"].shape[1] for _, named, _ in calls)
    assert with_padding - tokens == TOKENS - texts_of(family, pipe)[0] > 0


@pytest.mark.parametrize("family", ["qwen-image"], indirect=True)
@pytest.mark.parametrize("method", [OWN_TEXTS, Draft(length=1, reading="regions")], ids=["regional", "draft"])
def test_padding_may_stand_before_an_unconditional_text(family, pipe, method, monkeypatch):
    text, _ = pipe.encode_prompt("the photo", device="cpu")
    before = TOKENS - text.shape[1]
    negative = {
        "negative_prompt_embeds": pad(text, (0, 0, before, 0)),
        "negative_prompt_embeds_mask": torch.arange(TOKENS)[None] >= before,
    }
    given = {
        **CALL,
        **family.unguided,
        "true_cfg_scale": 3.0,
        **negative,
        "concepts": concepts("apart"),
        "method": method,
    }
    found = pipe(**given, generator=seeded(3)).images
    monkeypatch.setattr(type(backbone_of(pipe.transformer)), "hides_padding", False)
    torch.testing.assert_close(found, pipe(**given, generator=seeded(3)).images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["z-image"], indirect=True)
def test_texts_of_regions_may_be_longer_together_than_the_text_of_the_image_may_be(family, pipe):
    given = {**CALL, **family.unguided, "concepts": concepts("apart"), "method": OWN_TEXTS}
    short, long = (pipe(**given | {"max_sequence_length": n, "generator": seeded(3)}).images for n in (32, 96))
    assert torch.equal(short, long)


@pytest.mark.parametrize("family", slow_but(FEW, JOINT), indirect=True)
def test_maps_of_words_are_recorded_in_the_regions_own_texts(family, pipe):
    output = pipe(**CALL, **family.guided, concepts=concepts("apart"), method=OWN_TEXTS, record_attention=[0])
    left, right = (box.view(ROWS, CELLS) for box in map(inside, BOXES["apart"]))
    cat, dog = output.attention_maps[0, 0]
    assert (cat[left] > 0).all()
    assert (cat[right] == 0).all()
    assert (dog[right] > 0).all()
    assert (dog[left] == 0).all()


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_by_default_all_read_one_text_regions_are_isolated_at_first_and_words_of_others_are_kept(family, pipe):
    given = {**CALL, **family.unguided, "num_inference_steps": 10, "concepts": concepts("apart")}
    methods = (Regional(), Regional(texts="shared", isolate=0.5, token_mask="others"), Regional(token_mask="tara"))
    found, same, other = (pipe(**given, method=method, generator=seeded(3)).images for method in methods)
    assert torch.equal(found, same)
    assert (found - other).abs().max() > 1e-3


def test_texts_of_regions_need_a_transformer(tmp_path):
    with pytest.raises(ValueError, match="texts must be one of auto, shared, regions, subjects"):
        Regional(texts="own")  # pyright: ignore[reportArgumentType]
    unet = tiny_pipeline()
    save_file(lora_tensors(unet=random_lora(unet.unet, 0)), tmp_path / "cat.safetensors")
    unet.load_concept(tmp_path / "cat.safetensors")
    for method, message in (
        (Regional(texts="regions"), "texts='regions' needs a transformer"),
        (Regional(texts="subjects"), "texts='subjects' needs a transformer"),
        (Regional(isolate=True), "isolate needs a transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            unet("a cat", concepts=[Concept(name="cat", region=LEFT)], method=method, width=128, height=160)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_concept_about_which_no_text_can_be_made_reads_the_shared_one_or_is_refused(family, pipe, tmp_path, caplog):
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 2))), tmp_path / "bare.safetensors")
    pipe.load_concept(tmp_path / "bare.safetensors")
    try:
        call = {**CALL, **family.unguided, "concepts": [concepts("apart")[0], Concept(name="bare", region=RIGHT)]}
        with pytest.raises(ValueError, match=r"a text about each concept.*bare is not named in every prompt"):
            pipe(**call, method=Regional(texts="regions"))
        shared = pipe(**call, method="regional", generator=seeded(3)).images
        assert not caplog.text
        call["concepts"][0] = call["concepts"][0].model_copy(update={"prompt": "a sks cat"})
        assert torch.equal(pipe(**call, method="regional", generator=seeded(3)).images, shared)
        assert "no other can be made about bare" in caplog.text
    finally:
        pipe.unload_concept("bare")
