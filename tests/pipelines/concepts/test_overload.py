"""LoRAs that change more together than each was trained to are named with figures, and can be limited."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from components import lora_tensors, random_lora, seeded, tiny_pipeline
from flux import flux_pipeline
from lora_compose.attention import Lora, LoraFactors
from lora_compose.pipelines.concepts import overload
from lora_compose.pipelines.concepts.overload import joint_change
from lora_compose.pipelines.methods import Draft, Merge, Regional, Tara
from lora_compose.pipelines.scene.scene import Concept
from transformer_families import random_lora_of_all

PROMPT = "a cat, a dog, a kitten, a tom and a zwx"


@pytest.fixture
def pipe(write_lora: Callable[..., Path]) -> Any:
    """Two unrelated LoRAs, and one that is nearly the first."""
    pipe = tiny_pipeline()
    cat = random_lora(pipe.unet, 1)
    pipe.loras = {"cat": cat, "dog": random_lora(pipe.unet, 2), "kitten": cat, "tom": cat}
    for name, lora in pipe.loras.items():
        pipe.load_concept(write_lora(name, unet=lora), name, trigger=name)
    return pipe


def latents_of(pipe: Any, *concepts: Concept | str, method: Any = "merge") -> torch.Tensor:
    return pipe(
        PROMPT, concepts=list(concepts), method=method, num_inference_steps=2, output_type="latent",
        width=32, height=32, generator=seeded(),
    ).images  # fmt: skip


def warnings_of(pipe: Any, *concepts: Concept | str, method: Any = "merge", **options: Any) -> list[str]:
    plan = pipe.plan(PROMPT, concepts=list(concepts), method=method, width=32, height=32, **options)
    return [warning for warning in plan.warnings if "act on the same places" in warning]


def dense(lora: Lora, name: str) -> torch.Tensor:
    return lora[name].delta().double()


def test_the_joint_change_is_the_norm_of_the_dense_sum(pipe: Any) -> None:
    given = [Concept(name="cat", weight=0.7), Concept(name="dog", weight=-0.5), "kitten"]
    joint = joint_change(pipe.resolve_concepts(given))
    assert joint is not None
    assert joint.weights == (0.7, -0.5, 1.0)
    cat, dog, kitten = (pipe.loras[name] for name in ("cat", "dog", "kitten"))
    sums = 0.0
    for name, (together, alone) in joint.by_layer.items():
        each = [dense(lora, name) for lora in (cat, dog, kitten)]
        expected = 0.7 * each[0] - 0.5 * each[1] + each[2]
        assert together == pytest.approx(float(expected.norm()), rel=1e-5)
        assert alone == pytest.approx(max(float(one.norm()) for one in each), rel=1e-5)
        sums += float(expected.square().sum())
    largest = max(sum(float(dense(lora, name).square().sum()) for name in lora) for lora in (cat, dog))
    assert joint.ratio == pytest.approx((sums / largest) ** 0.5, rel=1e-5)


def test_what_adds_up_is_a_warning_with_figures_and_weights(pipe: Any) -> None:
    (said,) = warnings_of(pipe, "cat", "kitten")
    weights = [pipe.unet.get_submodule(name).weight.detach().double() for name in pipe.loras["cat"]]
    changed = sum(float(dense(pipe.loras["cat"], name).square().sum()) for name in pipe.loras["cat"])
    share = 2 * (changed / sum(float(weight.square().sum()) for weight in weights)) ** 0.5
    assert f"together their change is 2 times the larger one as it was trained, {share:.1%} of the weights" in said
    assert "use weights such as 0.5, 0.5, or Merge(limit=1)" in said
    half = Concept(name="cat", weight=0.5), Concept(name="kitten", weight=0.5)
    assert not warnings_of(pipe, *half)
    assert not warnings_of(pipe, "cat", "dog"), "unrelated changes add up to 1.4 times"
    assert not warnings_of(pipe, Concept(name="cat", weight=2.0)), "alone it is what was asked for"


def test_few_steps_without_guidance_are_warned_of_earlier(pipe: Any) -> None:
    def halves(**options: Any) -> list[str]:
        return warnings_of(pipe, *(Concept(name=name, weight=0.5) for name in ("cat", "dog")), **options)

    few: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 1.0}
    (said,) = halves(**few)
    assert re.search(r"their change is 0\.69 times the larger one as it was trained, \d+\.\d% of the weights", said)
    assert "Few-step models may take less" in said
    assert "use weights such as 0.31, 0.31, or Merge(limit=0.42), or keep them apart: method='regional'" in said
    assert not halves(**few | {"guidance_scale": 4.0})
    assert not halves(**few | {"num_inference_steps": 30})
    assert not halves(**few, method=Merge(limit=0.42))
    assert not halves(guidance_scale=1.0, num_inference_steps=30, image=Image.new("RGB", (32, 32)), strength=0.2)
    assert not warnings_of(pipe, *(Concept(name=name, weight=0.3) for name in ("cat", "dog")), **few)
    regions = [Concept(name=name, region=(left, 0, left + 16, 32)) for name, left in (("cat", 0), ("dog", 16))]
    assert not warnings_of(pipe, *regions, method="regional", **few), "what is kept apart does not add up"


def test_styles_act_beside_each_subject_and_subjects_apart(pipe: Any) -> None:
    regions = [Concept(name=name, region=(left, 0, left + 16, 32)) for name, left in (("cat", 0), ("kitten", 16))]
    assert not warnings_of(pipe, *regions, method="regional")
    style = Concept(name="tom", role="style")
    assert len(warnings_of(pipe, *regions, style, method="regional")) == 2


def test_subjects_whose_regions_overlap_act_together_there(pipe: Any) -> None:
    def placed(*boxes: tuple[int, int, int, int] | None) -> list[Concept]:
        return [Concept(name=name, region=box) for name, box in zip(("cat", "kitten", "dog"), boxes, strict=False)]

    left, right, wide = (0, 0, 17, 32), (17, 0, 32, 32), (0, 0, 24, 32)
    assert not warnings_of(pipe, *placed(left, right), method="regional"), "the border is inside of a cell"
    (said,) = warnings_of(pipe, *placed(wide, right), method="regional")
    assert "cat, kitten act on the same places: together their change is 2 times" in said
    assert "or give each a region that does not overlap the others" in said
    (said,) = warnings_of(pipe, *placed(left, None), method="regional")
    assert "cat, kitten" in said, "one without a region acts everywhere"
    (said,) = warnings_of(pipe, *placed(wide, wide, right), method="regional")
    assert "cat, kitten, dog act" in said, "not also each two of them"


@pytest.mark.parametrize(
    ("weights", "ratio"),
    [
        (("1..0", "0..1"), 1.0),
        (("0:1,0.5:0", "0:0,0.5:1"), None),
        (("0:1,0.5:0", "0:0,0.4:1"), 2.0),
        (("0:0..0.5:1..1:0", "0:0..0.5:1..1:0"), 2.0),
        ((1.0, "0:0,0.9:0.8"), 1.8),
    ],
)
def test_what_counts_is_the_step_in_which_they_change_most(pipe: Any, weights: Any, ratio: float | None) -> None:
    given = [Concept(name=name, weight=weight) for name, weight in zip(("cat", "kitten"), weights, strict=True)]
    joint = joint_change(pipe.resolve_concepts(given), steps=20)
    assert (joint and joint.ratio) == (ratio and pytest.approx(ratio, rel=1e-5))


def test_changes_of_the_models_own_weights_count(pipe: Any, tmp_path: Path) -> None:
    lora = pipe.loras["cat"]
    tensors = lora_tensors(unet=lora)
    for name in lora:
        weight = pipe.unet.get_submodule(name).weight
        tensors[f"unet.{name}.lora_magnitude_vector"] = 1.5 * weight.norm(dim=1)
    save_file(tensors, tmp_path / "dora.safetensors")
    pipe.load_concept(tmp_path / "dora.safetensors", "dora", trigger="tom")
    changes: dict[str, dict[str, torch.Tensor]] = {"dora": {}, "cat": {name: dense(lora, name) for name in lora}}
    for name in lora:
        weight = pipe.unet.get_submodule(name).weight.detach().double()
        changed = weight + dense(lora, name)
        norms = 1.5 * weight.norm(dim=1, keepdim=True)
        changes["dora"][name] = changed / changed.norm(dim=1, keepdim=True) * norms - weight
    both = sum(float((changes["dora"][name] + changes["cat"][name]).square().sum()) for name in lora)
    largest = max(sum(float(one.square().sum()) for one in each.values()) for each in changes.values())
    loaded = pipe.resolve_concepts(["dora", "cat"])
    joint = joint_change(loaded, pipe.unet)
    assert joint is not None
    assert joint.ratio == pytest.approx((both / largest) ** 0.5, rel=1e-4)
    assert joint.scales(0.1) == {}, "they are no multiples of their factors"
    with torch.no_grad():
        for name in lora:
            pipe.unet.get_submodule(name).weight *= 4
    again = joint_change(loaded, pipe.unet)
    assert again is not None
    assert again.ratio != pytest.approx(joint.ratio, rel=1e-3)


def test_changes_that_no_limit_reaches_are_warned_of_with_a_limit_too(pipe: Any, tmp_path: Path) -> None:
    for trigger, magnitude in (("tom", 1.5), ("zwx", 1.6)):
        tensors = lora_tensors(unet=pipe.loras["cat"])
        for layer in pipe.loras["cat"]:
            tensors[f"unet.{layer}.lora_magnitude_vector"] = magnitude * pipe.unet.get_submodule(layer).weight.norm(
                dim=1
            )
        path = tmp_path / f"{trigger}.safetensors"
        save_file(tensors, path)
        pipe.load_concept(path, f"dora-{trigger}", trigger=trigger)
    for method in (Merge(), Merge(limit=1)):
        (text,) = warnings_of(pipe, "dora-tom", "dora-zwx", method=method)
        assert "limit" not in text


def test_one_file_under_two_names_counts_once(pipe: Any) -> None:
    lora = pipe.concepts["cat"].lora
    assert not warnings_of(pipe, "cat", Concept(name="other", lora=lora, trigger="zwx"))


def test_a_limit_keeps_the_change_of_each_layer_within_it(pipe: Any) -> None:
    given = ["cat", "kitten", Concept(name="dog", weight=0.3)]
    assert not warnings_of(pipe, *given, method=Merge(limit=1.0))
    joint = joint_change(pipe.resolve_concepts(given))
    assert joint is not None
    names = list(pipe.loras["cat"])
    parts = (("cat", 1.0), ("kitten", 1.0), ("dog", 0.3))
    scaled = {
        name: torch.stack([weight * dense(pipe.loras[one], name) for one, weight in parts]).sum(dim=0) for name in names
    }
    for name in names:
        scaled[name] *= min(1.0, joint.by_layer[name][1] / float(scaled[name].norm()))
    limited = latents_of(pipe, *given, method=Merge(limit=1.0))
    with torch.no_grad():
        for name in names:
            weight = pipe.unet.get_submodule(name).weight
            weight += scaled[name].to(weight)
    expected = latents_of(pipe, Concept(name="cat", weight=0.0))
    torch.testing.assert_close(limited, expected, rtol=1e-3, atol=1e-3)


KEYS = re.compile(r"attn2\.to_[kv]$")
WITHOUT_CELLS = re.compile(r"attn2\.to_[kv]$|time_emb")


def scaled(pipe: Any, write_lora: Callable[..., Path], parts: Mapping[str, tuple[str, Mapping[str, float]]]) -> Any:
    """Another pipeline, whose LoRAs are multiples of these, layer by layer."""
    other = tiny_pipeline()
    for name, (lora, by) in parts.items():
        layers = {layer: replace(it, scale=it.scale * by.get(layer, 1.0)) for layer, it in pipe.loras[lora].items()}
        other.load_concept(write_lora(f"{name}-scaled", unet=layers), name, trigger=name)
    return other


def scales_of(pipe: Any, *parts: str) -> dict[str, float]:
    """By layer, what takes the sum of some LoRAs down to the largest of them."""
    found = {}
    for name in pipe.loras["cat"]:
        each = [dense(pipe.loras[part], name) for part in parts]
        found[name] = min(1.0, max(float(one.norm()) for one in each) / float(torch.stack(each).sum(dim=0).norm()))
    return found


@pytest.mark.parametrize(
    ("limited", "free"),
    [(Regional(limit=1.0), Regional()), pytest.param(Draft(limit=1.0), Draft(), marks=pytest.mark.slow)],
)
def test_regions_that_overlap_are_kept_within_a_limit_and_others_are_as_they_were(
    pipe: Any, write_lora: Callable[..., Path], limited: Any, free: Any
) -> None:
    boxes = {"cat": (0, 0, 20, 32), "kitten": (8, 0, 24, 32), "dog": (24, 0, 32, 32)}
    given = [Concept(name=name, region=box, class_word="a") for name, box in boxes.items()]
    assert warnings_of(pipe, *given, method=free)
    assert not warnings_of(pipe, *given, method=limited)
    by, everywhere = scales_of(pipe, "cat", "kitten"), scales_of(pipe, "cat", "kitten", "dog")
    assert max(by.values()) == pytest.approx(0.5)
    of_text = {name: scale for name, scale in everywhere.items() if WITHOUT_CELLS.search(name)}
    by |= {name: min(by[name], scale) for name, scale in of_text.items()}
    other = scaled(pipe, write_lora, {"cat": ("cat", by), "kitten": ("kitten", by), "dog": ("dog", of_text)})
    expected = latents_of(other, *given, method=free)
    torch.testing.assert_close(latents_of(pipe, *given, method=limited), expected, rtol=1e-4, atol=1e-4)
    assert float((latents_of(pipe, *given, method=free) - expected).abs().max()) > 1e-2


def test_a_style_beside_each_subject_is_kept_within_a_limit(pipe: Any, write_lora: Callable[..., Path]) -> None:
    given = [Concept(name=name, region=(left, 0, left + 16, 32)) for name, left in (("cat", 0), ("dog", 16))]
    given.append(Concept(name="tom", role="style"))
    by, beside = scales_of(pipe, "cat", "tom"), scales_of(pipe, "dog", "tom")
    everywhere = scales_of(pipe, "cat", "dog", "tom")
    for name, scale in everywhere.items():
        if WITHOUT_CELLS.search(name):
            by[name], beside[name] = min(by[name], scale), min(beside[name], scale)
    parts = {"cat": ("cat", by), "dog": ("dog", beside), "tom": ("tom", {n: min(by[n], beside[n]) for n in by})}
    expected = latents_of(scaled(pipe, write_lora, parts), *given, method=Regional())
    torch.testing.assert_close(latents_of(pipe, *given, method=Regional(limit=1.0)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["all", pytest.param("cross_kv", marks=pytest.mark.slow)])
def test_tara_is_limited_in_the_layers_in_which_loras_are_summed(
    pipe: Any, write_lora: Callable[..., Path], scope: Any
) -> None:
    by = {name: 1.0 if KEYS.search(name) else scale for name, scale in scales_of(pipe, "cat", "kitten").items()}
    assert sorted({round(scale, 4) for scale in by.values()}) == [0.5, 1.0]
    other = scaled(pipe, write_lora, {"cat": ("cat", by), "kitten": ("kitten", by)})
    expected = latents_of(other, "cat", "kitten", method=Tara(scope=scope))
    limited = latents_of(pipe, "cat", "kitten", method=Tara(scope=scope, limit=1.0))
    torch.testing.assert_close(limited, expected, rtol=1e-4, atol=1e-4)


def test_tara_is_limited_in_layers_with_text_and_image_too(write_lora: Callable[..., Path]) -> None:
    pipe = flux_pipeline()
    lora = random_lora(pipe.transformer, 1)
    for name in ("cat", "dog"):
        pipe.load_concept(write_lora(name, transformer=lora), name, trigger=name)
    plan = pipe.plan("a cat and a dog", concepts=["cat", "dog"], method=Tara(limit=1.0), width=32, height=32)
    sites = plan.resolved.canvas.backbone.sites
    joined = [name for name in lora if {"text", "image"} <= set(sites[name].parts)]
    limits = plan.resolved.concepts.loaded[0].limits
    assert joined
    assert [limits[name] for name in joined] == pytest.approx([0.5] * len(joined))


def test_concepts_with_one_file_keep_one_lora_within_a_limit(pipe: Any) -> None:
    boxes = {"cat": (0, 0, 20, 32), "again": (8, 0, 32, 32)}
    cat, again = (
        Concept(name=name, lora=pipe.concepts["cat"].lora, trigger=trigger, weight=weight, region=boxes[name])
        for name, trigger, weight in (("cat", "cat", 1.0), ("again", "zwx", 0.8))
    )
    beside = Concept(name="tom", role="style", lora=pipe.concepts["dog"].lora)
    for method in (Tara(limit=0.5), Regional(limit=0.5)):
        plan = pipe.plan(PROMPT, concepts=[cat, again, beside], method=method, width=32, height=32)
        first, second, _ = plan.resolved.concepts.loaded
        assert first.limits
        assert first.handle(first.factors.part) == second.handle(second.factors.part)


def test_draft_is_limited_in_the_text_that_all_regions_of_a_transformer_read(write_lora: Callable[..., Path]) -> None:
    pipe = flux_pipeline()
    lora = random_lora_of_all(pipe.transformer, 1)
    for name, trigger in (("cat", "sks"), ("dog", "zwx")):
        pipe.load_concept(write_lora(name, transformer=lora), name, trigger=trigger, class_word=name)
    asked: dict[str, Any] = {"concepts": ["cat", "dog"], "width": 32, "height": 32}
    plan = pipe.plan("a sks cat and a zwx dog", **asked, method=Draft(limit=1.0))
    sites = plan.resolved.canvas.backbone.sites
    limits = plan.resolved.concepts.loaded[0].limits
    assert limits == pytest.approx({name: 0.5 for name in lora if {*sites[name].parts} == {"text"}})
    assert "transformer_blocks.0.attn.add_k_proj" in limits


@pytest.mark.parametrize("method", [Merge, Regional, Draft, Tara])
def test_a_limit_is_positive(method: Any) -> None:
    with pytest.raises(ValueError, match="limit must be positive"):
        method(limit=0)


def test_a_limit_that_is_not_reached_changes_nothing(pipe: Any) -> None:
    assert torch.equal(latents_of(pipe, "cat", "dog"), latents_of(pipe, "cat", "dog", method=Merge(limit=9.0)))


def test_the_norm_of_a_lora_is_computed_once_whatever_is_beside_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    inner = overload.inner
    monkeypatch.setattr(overload, "inner", lambda a, b: counted.append(1) or inner(a, b))
    warnings_of(pipe, "cat", "dog")
    assert len(counted) == 2 * len(pipe.loras["cat"])
    warnings_of(pipe, "cat", Concept(name="dog", weight=0.5))
    warnings_of(pipe, "kitten", "dog")
    assert len(counted) == 3 * len(pipe.loras["cat"])


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("product", [False, True])
def test_the_joint_change_is_exact_with_few_and_with_many_ranks_and_with_products(rank: int, product: bool) -> None:
    numbers = seeded()
    parts = [
        (LoraFactors(torch.randn(rank, 32, generator=numbers), torch.randn(48, rank, generator=numbers), 0.3), weight)
        for weight in (1.0, -0.4, 0.7)
    ]
    if product:
        left, down = torch.randn(6, 4, generator=numbers), torch.randn(rank, 8, generator=numbers)
        parts.append((LoraFactors(down, torch.randn(8, rank, generator=numbers), left=left), 0.5))
    whole = torch.stack([weight * factors.delta().double() for factors, weight in parts]).sum(dim=0)
    assert overload._norm(parts) == pytest.approx(float(whole.norm()), rel=1e-5)
