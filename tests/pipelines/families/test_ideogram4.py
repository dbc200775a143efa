"""What Ideogram 4 alone has: a scale for every step, a second network for guidance, latents by row and column."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components import seeded
from ideogram4 import IDEOGRAM4
from lora_compose import Clora, ComposePipeline, Concept
from lora_compose.attention.backbones.ideogram4 import Ideogram4Backbone, from_tokens, tokens_of
from lora_compose.pipelines.families import ComposeIdeogram4Pipeline
from simulated_device import DEVICE, autocast_switched_off, numbers, parameters_that_move
from transformer_families import (
    BOXES,
    CALL,
    PROMPT,
    TOKENS,
    latents_of,
    pipeline_with_concepts,
    plain_latents,
    random_lora_of_all,
)

NOTHING = [Concept(name="cat", weight=0.0)]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(IDEOGRAM4, tmp_path_factory.mktemp("loras"))


def test_every_step_has_its_own_scale_and_no_second_pass_where_it_is_1(pipe: Any) -> None:
    scales, seen = [4.0, 1.0, 0.5, 2.0], []

    def look(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(pipe.guidance_scale)
        return tensors

    given = {**CALL, "num_inference_steps": 4, "guidance_schedule": scales}
    output = pipe(
        **given, concepts=NOTHING, method="merge", output_type="latent", generator=seeded(3), callback_on_step_end=look
    )
    torch.testing.assert_close(output.images, plain_latents(IDEOGRAM4, pipe, **given), atol=1e-5, rtol=0)
    assert seen == scales
    assert output.cost.rows_forward == 7


def test_a_text_encoder_that_is_offloaded_by_layers_reads_the_same() -> None:
    pipe, given = IDEOGRAM4.pipeline(), {"grid_h": 4, "grid_w": 4, "max_sequence_length": TOKENS}
    expected = pipe.encode_prompt([PROMPT], **given, device=torch.device("cpu"))
    with parameters_that_move(), autocast_switched_off():
        pipe.enable_sequential_cpu_offload(device=DEVICE)
        found = pipe.encode_prompt([PROMPT], **given, device=DEVICE)
    assert pipe.text_encoder.device.type == "meta"
    torch.testing.assert_close(numbers(found), expected)


def test_no_lora_acts_in_the_second_network_which_runs_no_other_rows(pipe: Any) -> None:
    rows: list[tuple[int, ...]] = []
    hook = pipe.unconditional_transformer.register_forward_pre_hook(
        lambda network, _, given: rows.append(tuple(given["hidden_states"].shape[:2])), with_kwargs=True
    )
    before = {name: id(layer) for name, layer in pipe.unconditional_transformer.named_modules()}
    try:
        latents_of(pipe, concepts=BOXES, method="regional", num_images_per_prompt=2, **IDEOGRAM4.guided)
    finally:
        hook.remove()
    assert rows == [(2, 64)] * 2, "two images of 64 cells, without text"
    assert before == {name: id(layer) for name, layer in pipe.unconditional_transformer.named_modules()}


def test_rows_of_both_networks_in_one_batch_are_refused(pipe: Any) -> None:
    backbone = Ideogram4Backbone(pipe.transformer, pipe.unconditional_transformer)
    added = {"text_mask": torch.ones(2, 3, dtype=torch.bool), "unconditional": torch.tensor([True, False])}
    with pytest.raises(ValueError, match="unconditional rows have a network of their own"):
        backbone.forward(torch.zeros(2, 4, 4, 4), torch.tensor(500.0), torch.zeros(2, 3, 48), added)


def test_noise_may_be_given_packed_or_by_row_and_column(pipe: Any) -> None:
    packed = torch.randn(1, 64, 16, generator=seeded(1))
    cells = from_tokens(packed, (16, 16))
    assert torch.equal(tokens_of(cells), packed)
    assert torch.equal(cells[0, :, 1, 0], packed[0, 0, 8:12]), "patch, row, column, channel"
    given = {**CALL, **IDEOGRAM4.guided}
    expected = plain_latents(IDEOGRAM4, pipe, latents=packed, **given)
    for latents in (packed, cells):
        found = latents_of(pipe, concepts=NOTHING, method="merge", latents=latents, **given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 0.5, "guidance_schedule": None}, "guidance below 1 in every step cannot be combined"),
        ({"guidance_scale": 3.0}, "Only one of `guidance_scale` and `guidance_schedule`"),
        ({"guidance_schedule": [3.0]}, "must have length `num_inference_steps`"),
        ({**IDEOGRAM4.guided, "prompt_upsampling": True}, "call pipe.upsample_prompt"),
        ({**IDEOGRAM4.guided, "image": torch.zeros(3, 128, 128)}, "diffusers has no image-to-image for Ideogram 4"),
    ],
)
def test_what_does_not_go_with_concepts_is_refused(pipe: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.plan(**CALL, **given, concepts=["cat"], method="merge")


def test_negative_prompts_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="Ideogram 4 reads no negative prompt"):
        pipe.guided(4.0, "grass")
    concepts = [concept.model_copy(update={"negative_prompt": "grass"}) for concept in BOXES]
    method = Clora(fuse="branches", uncond="each")
    with pytest.raises(ValueError, match="Ideogram 4 reads no negative prompts; leave them out"):
        latents_of(pipe, concepts=concepts, method=method, **IDEOGRAM4.guided)


def test_files_may_name_the_network_that_they_are_for(pipe: Any, tmp_path: Path) -> None:
    factors = random_lora_of_all(pipe.transformer, 0)["layers.0.attention.to_out.0"]
    stem = "conditional_transformer.layers.0.attention.o"
    save_file(
        {f"{stem}.lora_A.weight": factors.down, f"{stem}.lora_B.weight": factors.up}, tmp_path / "bird.safetensors"
    )
    pipe.load_concept(tmp_path / "bird.safetensors", trigger="xlo")
    (bird,) = pipe.resolve_concepts(["bird"])
    pipe.unload_concept("bird")
    assert list(bird.factors.model) == ["layers.0.attention.to_out.0"]


def test_words_are_found_whatever_side_the_tokenizer_pads(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = CALL["prompt"]
    start = prompt.index("sks")
    for side in ("right", "left"):
        monkeypatch.setattr(pipe.tokenizer, "padding_side", side)
        assert pipe._template(48).positions(prompt, start, start + 3) == IDEOGRAM4.words[0]


def test_boxes_of_a_scene_are_written_into_the_texts_that_its_regions_read(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of the image has both boxes and no trigger, that of each region its own."""
    read: list[str] = []
    encoded = pipe._encoded
    monkeypatch.setattr(pipe, "_encoded", lambda words, *rest: (read.extend(words), encoded(words, *rest))[1])
    prompt, concepts = pipe.boxes_in_prompt(CALL["prompt"], BOXES, 128, 128)
    given = {**CALL, "max_sequence_length": 400, "prompt": prompt}
    latents = latents_of(pipe, **given, concepts=concepts, method="regional", **IDEOGRAM4.guided)
    whole, cat, dog = (json.loads(text) for text in read)
    assert whole["high_level_description"] == "a cat and a dog on grass"
    parts = [text["compositional_deconstruction"]["elements"] for text in (whole, cat, dog)]
    left, right = [0, 0, 1000, 500], [0, 500, 1000, 1000]
    assert [[(element["bbox"], element["desc"].strip()) for element in each] for each in parts] == [
        [(left, "cat"), (right, "dog")], [(left, "sks cat")], [(right, "zwx dog")],
    ]  # fmt: skip
    assert [cat["high_level_description"], dog["high_level_description"]] == [
        "a sks cat on grass",
        "a zwx dog on grass",
    ]
    plain = latents_of(
        pipe, **{**given, "prompt": CALL["prompt"]}, concepts=BOXES, method="regional", **IDEOGRAM4.guided
    )
    assert (latents - plain).abs().max() > 0.01


def test_what_has_no_box_is_not_written_into_a_prompt(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no box to write into the prompt"):
        pipe.boxes_in_prompt(CALL["prompt"], ["cat"])
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="'dog' has a mask image, and the model's prompts have boxes"):
        pipe.boxes_in_prompt(CALL["prompt"], [BOXES[0], Concept(name="dog", region=str(tmp_path / "mask.png"))])
    _, (cat, dog) = pipe.boxes_in_prompt(CALL["prompt"], [BOXES[0], "dog"])
    assert cat.prompt.startswith("{")
    assert dog.prompt is None


def test_a_plain_pipeline_becomes_one_of_ours() -> None:
    assert type(ComposePipeline.from_pipe(IDEOGRAM4.pipeline(IDEOGRAM4.plain))) is ComposeIdeogram4Pipeline
