"""Metrics that a user chooses by name: what they need, and their numbers against transformers' own models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from commands import call, flat
from lora_compose.compose.evaluation.chosen import MODELS, chosen
from lora_compose.compose.evaluation.planning import plan_batches
from lora_compose.compose.evaluation.scoring import open_scorer, reference_crops, squared
from lora_compose.compose.evaluation.suite import Suite, SuiteScene, moved_suite, read_suite


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # an untrained model gives nearly the same for everything
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def quick(*names: str, **changes: Any) -> Suite:
    return read_suite("playground-quick").model_copy(update={"metrics": chosen(names), **changes})


# --- names ---


def test_names_have_models_of_their_own() -> None:
    found = chosen(["dino", "clip-t = folder", "scr=playground:judge"])
    assert [(one.name, one.model) for one in found] == [
        ("dino", MODELS["dino"]), ("clip-t", "folder"), ("scr", "playground:judge")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lpips"], "there is no metric 'lpips'; choose from clip-t, clip-i, dino, scr, arcface"),
        (["dino", "dino=folder"], "the metric 'dino' stands twice"),
        (["dino="], "names no model: write dino=FOLDER, or only dino"),
        (["arcface"], "^arcface needs a network of yours that recognises faces"),
        (["arcface="], "^arcface needs a network of yours"),
    ],
)
def test_what_is_no_metric_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(names)


def test_in_a_suite_they_are_names_or_have_settings() -> None:
    fields = read_suite("playground-quick").model_dump()
    scr = {"name": "scr", "model": "playground:judge", "threshold": 0.5}
    suite = Suite.model_validate(fields | {"metrics": ["dino", scr]})
    assert [(one.name, one.model, one.threshold) for one in suite.metrics] == [
        ("dino", MODELS["dino"], None), ("scr", "playground:judge", 0.5)
    ]  # fmt: skip
    assert Suite.model_validate_json(suite.model_dump_json()) == suite
    moved = moved_suite(suite, lambda source: f"/there/{source}")
    assert [one.model for one in moved.metrics] == [f"/there/{MODELS['dino']}", "/there/playground:judge"]
    for wrong, message in (
        ([{"name": "dino", "threshold": 0.5}], "reads no threshold"),
        (["scr", "scr"], "stands twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Suite.model_validate(fields | {"metrics": wrong})


def test_other_metrics_need_other_scores_of_the_same_images() -> None:
    plain, more, other = (
        plan_batches(quick(*names)).batches[0] for names in ((), ("dino",), ("dino=facebook/another",))
    )
    assert plain.key == more.key == other.key
    assert len({plain.scores, more.scores, other.scores}) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("dino", f"the metric dino needs the model '{MODELS['dino']}'"),
        ("clip-i,dino", f"(hf download {MODELS['clip-i']}), or name the folder of one: --metrics clip-i=FOLDER"),
        ("scr=/nowhere/dinov2", "the metric scr needs the model '/nowhere/dinov2', and there is no encoder"),
    ],
)
def test_what_a_metric_needs_is_said_before_anything_is_made(tmp_path: Path, names: str, message: str) -> None:
    out = tmp_path / "out"
    found = call("evaluate", "run", "playground-quick", "--out", out, "--metrics", names, code=2)
    assert message in flat(found.output)
    assert not out.exists()


def test_clip_t_needs_a_model_that_reads(dino: Path) -> None:
    with pytest.raises(ValueError, match=r"compares images with their prompts, and .* of the family 'dinov2' reads no"):
        open_scorer(quick(f"clip-t={dino}"))


# --- numbers ---


def test_dino_compares_the_class_token_of_the_image_and_of_what_was_found(dino: Path) -> None:
    concepts = tuple(read_suite("playground-quick").concept(name) for name in ("bear", "robot"))
    halves = {"bear": (0, 0, 64, 100), "robot": (64, 0, 128, 128)}
    prompt = "a xlo bear and a qrt robot on a white background"
    scene = SuiteScene(name="pair", prompt=prompt, concepts=("bear", "robot"), regions=halves)
    names = (f"dino={dino}", f"scr={dino}", "clip-t=playground:judge")
    suite = quick(*names, detector=None, concepts=concepts, scenes=(scene,))
    image = Image.effect_noise((128, 128), 90).convert("RGB")
    scores = open_scorer(suite).score(image, scene)

    model, processor = Dinov2Model.from_pretrained(dino).eval(), BitImageProcessorPil.from_pretrained(dino)

    @torch.no_grad()
    def token(shown: Image.Image) -> torch.Tensor:
        return model(**processor(images=[shown], return_tensors="pt")).last_hidden_state[0, 0]

    for name, box in halves.items():
        references = [token(one) for one in reference_crops(suite.concept(name))]
        whole, crop = token(image), token(squared(image.crop(box)))
        by_hand = [sum(float(F.cosine_similarity(one, r, dim=0)) for r in references) / len(references)
                   for one in (whole, crop)]  # fmt: skip
        found = scores.chosen["dino"].whole[name], scores.chosen["dino"].found[name]
        assert found == pytest.approx(by_hand, abs=2e-5)
    assert scores.chosen["scr"] == scores.chosen["dino"]
    assert scores.chosen["dino"].text is None
    assert scores.chosen["clip-t"].text == scores.clip_t
