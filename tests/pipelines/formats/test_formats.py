"""One change, written in every format, is read as the same change; other kinds are what their formulas say."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from components import ATTENTION, EVERYTHING, random_lora, sd_unet, sdxl_unet, tiny_pipeline
from layouts import file_of, layout
from lora_compose import Concept
from lora_compose.attention import Lora
from lora_compose.compose.benchmark.architectures import SD15, SDXL, without_weights
from lora_compose.compose.generate.making import load
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from lora_compose.pipelines.formats.kinds import kind_of
from pairs import in_pairs
from recipe.lora_files import FORMATS, Format, bare, kohya, pair, with_alpha
from reference import deltas, dense

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK = 3
Tensors = dict[str, Tensor]


def sd_parts() -> SimpleNamespace:
    text = CLIPTextConfig(
        vocab_size=9, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return SimpleNamespace(unet=sd_unet(), text_encoder=CLIPTextModel(text))


def sdxl_parts() -> SimpleNamespace:
    text: dict[str, Any] = {"vocab_size": 9, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SimpleNamespace(
        unet=sdxl_unet(transformer_layers_per_block=(1, 2, 2)),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=8, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, projection_dim=12, **text)),
    )


PARTS = {"SD": sd_parts, "SDXL": sdxl_parts}


@cache
def parts_of(family: str) -> SimpleNamespace:
    """Small real models of one family; never changed."""
    return PARTS[family]()


def loras_for(parts: SimpleNamespace, targets: tuple[str, ...]) -> dict[str, Lora]:
    loras = {}
    for number, (part, model) in enumerate(vars(parts).items()):
        wanted = targets if part == "unet" else TEXT
        loras[part] = random_lora(model, number, rank=RANK, targets=wanted)
    return loras


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 0
    for name, delta in expected.items():
        assert found[name].shape == delta.shape, name
        assert (found[name] - delta).abs().max() <= tolerance * delta.abs().max(), name
        assert delta.abs().max() > 0


@pytest.mark.parametrize(("form", "family"), in_pairs(FORMATS, PARTS))
def test_the_same_change_in_every_format_is_the_same(form: str, family: str, tmp_path: Path) -> None:
    parts = parts_of(family)
    known, loras = FORMATS[form], loras_for(parts, EVERYTHING)
    file = read_lora(known.write(loras, parts, tmp_path), allow_pickle=known.options.get("allow_pickle", False))
    factors = match(file, parts, alpha=known.options.get("alpha"))
    assert factors.unmatched == ()
    assert factors.error == 0.0
    held = known.held(loras)
    assert "unet" in held
    expected = {f"{part}.{name}": dense(found) for part, lora in held.items() for name, found in lora.items()}
    assert_close(deltas(factors), expected)


def test_a_whole_unet_is_as_strong_as_the_given_alpha(tmp_path: Path) -> None:
    parts = parts_of("SD")
    file = read_lora(FORMATS["TARA, whole UNet"].write(loras_for(parts, ATTENTION), parts, tmp_path))
    once, fourfold = (deltas(match(file, parts, alpha=alpha)) for alpha in (8, 32))
    assert_close(fourfold, {name: 4 * delta for name, delta in once.items()})


# Independent references: diffusers for names, PEFT and the formulas of LyCORIS for changes.


@pytest.mark.parametrize(
    "name",
    ["kohya-sd15", "kohya-sd15-conv", "kohya-sdxl", "diffusers-0.14", "diffusers-0.22-sdxl", "diffusers-0.35-sdxl"],
)
def test_layers_are_those_that_diffusers_finds(name: str) -> None:
    """Every tensor holds a number of its own, by which diffusers' result and ours are compared."""
    known = layout(name)
    file = file_of(known)
    for number, (key, tensor) in enumerate(file.tensors.items()):
        if not key.endswith(".alpha"):
            file.tensors[key] = torch.tensor(float(number)).expand(tensor.shape)  # pyright: ignore[reportIndexIssue]
    factors = match(file, without_weights(known["family"]))
    pipeline, config = (
        (StableDiffusionXLPipeline, SDXL) if known["family"] == "SDXL" else (StableDiffusionPipeline, SD15)
    )
    settings = SimpleNamespace(layers_per_block=2, **config)
    result = pipeline.lora_state_dict(dict(file.tensors), unet_config=settings)[0]
    theirs = {key.removeprefix("unet."): t for key, t in result.items() if not key.startswith("text_")}
    theirs = convert_unet_state_dict_to_peft(theirs)
    ours = {f"{name}.lora_A.weight": float(lora.down.flatten()[0]) for name, lora in factors.model.items()}
    ours |= {f"{name}.lora_B.weight": float(lora.up.flatten()[0]) for name, lora in factors.model.items()}
    assert ours == {key: float(tensor.flatten()[0]) for key, tensor in theirs.items()}
    assert len(ours) >= 256


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "conv1", "proj_in"], alpha_pattern={"attn2.to_q": 3}),
        LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "conv1"], use_rslora=True, init_lora_weights=False),
        LoHaConfig(r=3, alpha=6, target_modules=["to_q", "conv1", "proj_in"], init_weights=False),
        LoHaConfig(r=3, alpha=6, target_modules=["conv1"], use_effective_conv2d=True, init_weights=False),
        LoKrConfig(r=2, alpha=4, target_modules=["to_q", "proj_in"], init_weights=False),
        LoKrConfig(r=2, alpha=4, target_modules=["conv1"], use_effective_conv2d=True, init_weights=False),
        LoKrConfig(r=2, alpha=5, target_modules=["to_q"], decompose_both=True, decompose_factor=4, init_weights=False),
    ],
    ids=["LoRA", "rsLoRA", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, Tucker", "LoKr, both in factors"],
)
def test_files_of_peft_with_their_settings_beside_them(config: Any, tmp_path: Path) -> None:
    if isinstance(config, LoraConfig):
        config.init_lora_weights = False
    unet = sd_unet()
    torch.manual_seed(1)
    inject_adapter_in_model(config, unet, "default")
    saved = get_peft_model_state_dict(unet, adapter_name="default")
    tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in saved.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings, default=str))
    factors = match(read_lora(tmp_path / "adapter_model.safetensors"), SimpleNamespace(unet=sd_unet()))
    expected = {
        f"unet.{name}": module.get_delta_weight("default").detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert factors.complete
    assert_close(deltas(factors), expected)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lycoris() -> dict[str, tuple[Tensors, Tensor]]:
    """Slots, and the change by LyCORIS' definition, in fp64: with scale 0.5."""
    a, b, c, d = (numbers(*shape, seed=i) for i, shape in enumerate([(12, 2), (2, 10), (12, 2), (2, 10)]))
    found = {
        "LoHa": ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, (a @ b) * (c @ d)),
    }
    a, b, c, d = (numbers(*shape, seed=i) for i, shape in enumerate([(2, 12), (2, 10), (2, 12), (2, 10)]))
    s, t = numbers(2, 2, 3, 3, seed=7), numbers(2, 2, 3, 3, seed=8)
    halves = (torch.einsum("ijhw,ip,jr->prhw", core, up, down) for core, up, down in ((s, a, b), (t, c, d)))
    slots = {"hada_t1": s, "hada_w1_a": a, "hada_w1_b": b, "hada_t2": t, "hada_w2_a": c, "hada_w2_b": d}
    found["LoHa, Tucker"] = (slots, next(halves) * next(halves))
    small, large = numbers(3, 2, seed=1), numbers(4, 5, seed=2)
    found["LoKr"] = ({"lokr_w1": small, "lokr_w2": large}, torch.kron(small, large))
    a, b = numbers(3, 2, seed=3), numbers(2, 2, seed=4)
    found["LoKr, small one in factors"] = ({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": large}, torch.kron(a @ b, large))
    kernel = numbers(4, 5, 3, 3, seed=5)
    found["LoKr, convolution"] = (
        {"lokr_w1": small, "lokr_w2": kernel},
        torch.kron(small[..., None, None], kernel.contiguous()),
    )
    up, down, core = numbers(2, 4, seed=1), numbers(2, 5, seed=2), numbers(2, 2, 3, 3, seed=3)
    kernel = torch.einsum("ijhw,ip,jr->prhw", core, up, down)
    slots = {"lokr_w1": small, "lokr_w2_a": up, "lokr_w2_b": down, "lokr_t2": core}
    found["LoKr, Tucker"] = (slots, torch.kron(small[..., None, None], kernel.contiguous()))
    up, down = numbers(12, 2, 1, 1, seed=1), numbers(3, 10, 1, 1, seed=2)
    mid = numbers(2, 3, 3, 3, seed=3)
    change = torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    found["LoCon, Tucker"] = ({"down": down, "mid": mid, "up": up}, change)
    down, up = numbers(2, 10, 3, 3, seed=1), numbers(12, 2, 1, 1, seed=2)
    found["LoCon"] = ({"down": down, "up": up}, torch.einsum("or,rihw->oihw", up[..., 0, 0], down))
    return found


@pytest.mark.parametrize("kind", lycoris())
def test_changes_are_what_lycoris_defines(kind: str) -> None:
    slots, expected = lycoris()[kind]
    tensors = {slot: tensor.float() for slot, tensor in slots.items()}
    made = kind_of(slots).load(tensors, 0.5)
    assert_close({"it": kind_of(slots).delta(tensors).double()}, {"it": expected})
    assert made.lost <= 1e-10 * float((expected**2).sum())
    assert_close({"it": dense(made.factors).double()}, {"it": 0.5 * expected})


@pytest.mark.parametrize("kind", [kind for kind in lycoris() if "LoCon" not in kind] + ["whole difference", "large"])
@pytest.mark.parametrize("max_rank", [1, 3])
def test_what_is_cut_is_the_best_of_its_rank_and_the_error_is_true(kind: str, max_rank: int) -> None:
    if kind == "large":  # more than the leading singular vectors are worth computing
        spectrum = torch.diag(0.7 ** torch.arange(90.0))
        q, r = (torch.linalg.qr(numbers(90, 90, seed=i).float()).Q for i in (1, 2))
        slots, expected = {"diff": q @ spectrum @ r}, 2 * (q @ spectrum @ r).double()
    else:
        slots, expected = lycoris().get(kind, ({"diff": numbers(9, 7, seed=1)}, numbers(9, 7, seed=1)))
    made = kind_of(slots).load({slot: tensor.float() for slot, tensor in slots.items()}, 0.5, max_rank)
    expected = (1.0 if kind == "whole difference" else 0.5) * expected
    values = torch.linalg.svdvals(expected.flatten(1))
    kept = dense(made.factors).double()
    assert made.factors.rank <= max_rank
    assert float(((kept - expected) ** 2).sum()) == pytest.approx(made.lost, rel=1e-4, abs=1e-9)
    assert made.lost == pytest.approx(float((values[max_rank:] ** 2).sum()), rel=1e-3, abs=1e-9)
    assert made.lost > 0


def test_the_relative_error_of_a_file_is_reported(tmp_path: Path) -> None:
    parts = sd_parts()
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"]
    whole = {
        name: numbers(*parts.unet.get_submodule(name).weight.shape, seed=i).float() for i, name in enumerate(names)
    }
    path = tmp_path / "it.safetensors"
    save_file({f"{kohya(parts, 'unet', name)}.diff": tensor for name, tensor in whole.items()}, path)
    exact, cut = match(read_lora(path), parts), match(read_lora(path), parts, max_rank=4)
    assert (exact.error, exact.notes) == (0.0, ())
    missing = sum(float(((dense(cut.model[name]) - tensor) ** 2).sum()) for name, tensor in whole.items())
    assert cut.error == pytest.approx((missing / sum(float((t**2).sum()) for t in whole.values())) ** 0.5, rel=1e-4)
    assert f"2 layers have more rank than max_rank=4 and are cut to it: relative error {cut.error:.2%}" in cut.report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lokr_of_two_whole_matrices_is_not_scaled_by_alpha(tmp_path: Path, dtype: torch.dtype) -> None:
    """LyCORIS writes an alpha beside them that has no meaning; ai-toolkit's is infinite in fp16."""
    parts, name = sd_parts(), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    small, large = numbers(2, 2, seed=1).float(), numbers(4, 4, seed=2).float()
    tensors = {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(9_999_999_999).to(dtype)}
    save_file({f"{kohya(parts, 'unet', name)}.{key}": t for key, t in tensors.items()}, tmp_path / "it.safetensors")
    factors = match(read_lora(tmp_path / "it.safetensors"), parts)
    assert_close(deltas(factors), {f"unet.{name}": torch.kron(small, large)})


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
def test_an_alpha_that_has_an_effect_is_finite(tmp_path: Path, alpha: float) -> None:
    parts = sd_parts()
    path = FORMATS["kohya"].write({"unet": random_lora(parts.unet, 1, targets=("attn1.to_q",))}, parts, tmp_path)
    tensors = {k: torch.tensor(alpha) if k.endswith(".alpha") else t for k, t in read_lora(path).tensors.items()}
    save_file(tensors, path)
    with pytest.raises(LoraError, match=r"NaN or infinite|no usable alpha: alpha is inf"):
        match(read_lora(path), parts)


@pytest.mark.parametrize("missing", ["hada_w1_a", "hada_w2_b", "lokr_w1", "lokr_w2_b", "down", "up"])
def test_incomplete_layers_are_refused(missing: str) -> None:
    kinds = [slots for slots, _ in lycoris().values()]
    kinds.append(
        {"lokr_w1": numbers(2, 2, seed=1), "lokr_w2_a": numbers(4, 2, seed=1), "lokr_w2_b": numbers(2, 4, seed=1)}
    )
    for slots in kinds:
        if missing in slots:
            rest = {slot: tensor.float() for slot, tensor in slots.items() if slot != missing}
            with pytest.raises(ValueError, match="incomplete"):
                kind_of(rest).load(rest, 1.0)


def test_biases_and_norms_are_left_out_aloud(tmp_path: Path) -> None:
    parts = sd_parts()
    loras = {"unet": random_lora(parts.unet, 1, targets=("attn1.to_q",))}
    path = FORMATS["kohya"].write(loras, parts, tmp_path)
    tensors = {**read_lora(path).tensors, "lora_unet_conv_in.diff_b": torch.ones(8)}
    tensors["lora_unet_down_blocks_0_attentions_0_norm.w_norm"] = torch.ones(8)
    save_file(tensors, path)
    factors = match(read_lora(path), parts)
    assert factors.unmatched == ()
    assert "2 keys with biases or norms are left out, since no low-rank change can express them" in factors.report
    assert not factors.complete


def test_one_layer_under_two_names_must_be_the_same(tmp_path: Path) -> None:
    parts = sdxl_parts()
    names = ["lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"]
    lora = random_lora(parts.unet, 1, targets=("down_blocks.1.attentions.0.proj_in",))
    (found,) = lora.values()
    tensors = {f"{name}{suffix}": t.clone() for name in names for suffix, t in with_alpha(found).items()}
    save_file(tensors, tmp_path / "it.safetensors")
    assert len(match(read_lora(tmp_path / "it.safetensors"), parts).model) == 1
    tensors[f"{names[0]}.lora_up.weight"] = tensors[f"{names[0]}.lora_up.weight"] + 1
    save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(LoraError, match=r"more than one LoRA for unet\.down_blocks\.1"):
        match(read_lora(tmp_path / "it.safetensors"), parts)


def test_concepts_with_another_alpha_are_another_strength(tmp_path: Path) -> None:
    """Through scenes as well, where the file does not contain its alpha."""
    pipe: Any = tiny_pipeline()
    lora = {"unet": random_lora(pipe.unet, 1, rank=RANK)}
    path = Format(bare, pair(".lora_layer.down.weight", ".lora_layer.up.weight")).write(lora, pipe, tmp_path)
    with pytest.raises(LoraError, match="does not contain its alpha"):
        pipe.load_concept(path, name="cat")
    concept = Concept(name="cat", lora=str(path), alpha=RANK)
    for alpha in (1.0, 4.0, 4.0, 1.0):
        found = load(pipe, concept.model_copy(update={"alpha": alpha * RANK}))
        assert {factors.scale for factors in found.factors.model.values()} == {alpha}
    with pytest.raises(ValueError, match="was loaded with another alpha"):
        pipe.resolve_concepts([Concept(name="cat", alpha=7)])
    (given,) = pipe.resolve_concepts([concept.model_copy(update={"alpha": 2.0 * RANK})])
    assert {factors.scale for factors in given.factors.model.values()} == {2.0}


def test_a_file_takes_one_block_of_memory_also_where_its_tensors_lie_at_odd_bytes(tmp_path: Path) -> None:
    """Hundreds of small blocks for each of many files fragment the memory of a server."""
    path = tmp_path / "odd.safetensors"
    stored = {"to_q.alpha": torch.tensor([3], dtype=torch.int8), "to_q.lora_down.weight": torch.randn(2, 8),
              "to_q.lora_up.weight": torch.randn(8, 2).half()}  # fmt: skip
    raw, header = b"", {}
    kinds = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
    for name, tensor in stored.items():
        data = tensor.numpy().tobytes()
        places = [len(raw), len(raw) + len(data)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": [*tensor.shape], "data_offsets": places}
        raw += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    found = read_lora(path).tensors
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
