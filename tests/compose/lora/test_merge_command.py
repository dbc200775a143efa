"""`lora-compose merge`: several files in, one ordinary file out, or a message and nothing at all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from components import EVERYTHING, FAMILIES, State, random_lora, save_lora, seeded, text_loras
from disks import files_of_at_most
from layouts import layout, shapes_of
from lora_compose.attention import Lora, LoraFactors
from lora_compose.compose.cli import app
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, merge_files
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from lora_compose.pipelines.formats.lora_writer import Spelling
from lora_compose.pipelines.merging import MERGERS, make_merger
from lora_compose.pipelines.merging.calibration import calibrate
from lora_compose.pipelines.scene.sources import parse_lora
from pairs import slow_but
from recipe.lora_files import FORMATS
from recipe.merging import PAIRS, drawn, images
from reference import dense

PLAIN = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
run = CliRunner().invoke
pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")

# Of SD 1.5 and SDXL at full size: the width of its inputs tells which of them a file is for.
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def text_of(result: Any) -> str:
    return " ".join(result.output.split())


def given(*files: tuple[Path, float]) -> list[Given]:
    return [Given(path.name, read_lora(path), weight) for path, weight in files]


def deltas(path: Path, pipe: Any) -> dict[str, Tensor]:
    found = match(read_lora(path), pipe)
    assert found.complete, found.report
    parts = found.by_part
    return {f"{part}.{name}": dense(factors) for part, lora in parts.items() for name, factors in lora.items()}


def added(*changes: tuple[Mapping[str, Tensor], float]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for change, _ in changes for name in change)
    return {name: torch.stack([w * c[name] for c, w in changes if name in c]).sum(0) for name in names}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def image(pipe: Any) -> Tensor:
    return pipe("a sks cat", num_inference_steps=1, output_type="pt", generator=seeded(), height=64, width=64).images


def two_loras(pipe: Any) -> list[dict[str, Lora]]:
    """Of different ranks, scales and layers, with text encoders and convolutions."""
    text = ("q_proj", "v_proj", "out_proj")
    unet = [
        random_lora(pipe.unet, 1, targets=EVERYTHING, scale=0.5, size=0.2),
        random_lora(pipe.unet, 3, rank=2, scale=1.5, size=0.2),
    ]
    return [
        {"unet": unet[0], **text_loras(pipe, 2, targets=text)},
        {"unet": unet[1], **text_loras(pipe, 4, targets=(*text, "fc1"), rank=4)},
    ]


@pytest.fixture(scope="module")
def pipe_and_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A small pipeline, and the files of two LoRAs for it."""
    pipe, folder = FAMILIES["sd"](), tmp_path_factory.mktemp("two")
    return pipe, [save_lora(folder / f"{i}.safetensors", **loras) for i, loras in enumerate(two_loras(pipe))]


@pytest.mark.parametrize(
    ("family", "spelling"), [("sd", "kohya"), pytest.param("sdxl", "diffusers", marks=pytest.mark.slow)]
)
def test_cat_gives_plain_diffusers_the_image_of_both_loras(
    family: str, spelling: Spelling, write_lora: Callable[..., Path], tmp_path: Path
) -> None:
    plain = FAMILIES[family](PLAIN[family])
    files = [write_lora(str(i), **loras) for i, loras in enumerate(two_loras(plain))]
    before = image(plain)
    for i, path in enumerate(files):
        plain.load_lora_weights(path, adapter_name=f"lora{i}")
    plain.set_adapters(["lora0", "lora1"], [0.8, -0.5])
    both = image(plain)
    plain.unload_lora_weights()
    out = tmp_path / "out.safetensors"
    matched = match_files(given((files[0], 0.8), (files[1], -0.5)), plain, spelling=spelling)
    report = merge_files(matched, make_merger("cat"), out)
    plain.load_lora_weights(out)
    error = (image(plain) - both).abs()
    assert float(error.mean()) <= 1e-6
    assert float(error.max()) <= 1e-5  # rounding: the sum has another order
    assert float((before - both).abs().max()) > 1e-3
    assert report.notes == ()


@pytest.mark.parametrize("name", MERGERS)
def test_the_file_holds_what_the_merger_makes_of_every_layer(
    name: str, pipe_and_files: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    pipe, files = pipe_and_files
    matched = match_files(given((files[0], 1.0), (files[1], 0.5)), pipe)
    merger = make_merger(name)
    moments = calibrate(pipe, matched.changes, ["a cat", "a dog"], merger, steps=1) if merger.needs_model else {}
    merge = merger.start([*matched.changes.values()])
    made = {layer: merge(changes, moments.get(layer)) for layer, changes in matched.changes.items()}
    out = tmp_path / "out.safetensors"
    merge_files(matched, merger, out, moments=moments)
    expected = {
        f"{part}.{layer}": dense(LoraFactors(f.down.float(), f.up.float())) for (part, layer), f in made.items()
    }
    found = {name: delta.flatten(1) for name, delta in deltas(out, pipe).items()}
    assert_same(found, expected)


@pytest.mark.parametrize("name", slow_but(("svd", "ties", "soups"), MERGERS))
def test_one_file_stays_what_it_is_and_weight_0_is_as_if_a_file_were_not_there(
    name: str, pipe_and_files: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    pipe, (one, other) = pipe_and_files
    matched = match_files(given((one, 1.0), (other, 0.0)), pipe)
    merger = make_merger(name)
    moments = calibrate(pipe, matched.changes, ["a cat", "a dog"], merger, steps=1) if merger.needs_model else None
    out = tmp_path / "out.safetensors"
    report = merge_files(matched, merger, out, moments=moments)
    assert_same(deltas(out, pipe), deltas(one, pipe))
    assert report.blocks[-1].kept[0] == pytest.approx(1.0)


def test_a_file_without_alpha_is_reported(tmp_path: Path) -> None:
    pipe = FAMILIES["sd"](StableDiffusionPipeline)
    loras = {"unet": random_lora(pipe.unet, 1)}
    path = FORMATS["TARA, whole UNet"].write(loras, pipe, tmp_path)
    (tmp_path / "other").mkdir()
    other = FORMATS["kohya"].write({"unet": random_lora(pipe.unet, 5)}, pipe, tmp_path / "other")
    with pytest.raises(LoraError, match="does not contain its alpha"):
        match_files(given((path, 1.0), (other, 1.0)), pipe)
    out = tmp_path / "out.safetensors"
    matched = match_files(given((path, 1.0), (other, 1.0)), pipe, alpha=32.0)
    merge_files(matched, make_merger("cat"), out)
    told = {f"unet.{name}": dense(factors) for name, factors in loras["unet"].items()}
    assert_same(deltas(out, pipe), added((told, 1.0), (deltas(other, pipe), 1.0)))


def test_the_report_tells_what_was_kept_and_what_the_files_share(
    write_lora: Callable[..., Path], tmp_path: Path
) -> None:
    pipe = FAMILIES["sd"]()
    lora = random_lora(pipe.unet, 1)
    mixed = {n: LoraFactors(torch.cat([f.down, g.down]), torch.cat([f.up, g.up], 1)) for (n, f), g in
             zip(lora.items(), random_lora(pipe.unet, 2).values(), strict=True)}  # fmt: skip
    files = [write_lora("one", unet=lora), write_lora("mixed", unet=mixed)]
    out = tmp_path / "out.safetensors"
    matched = match_files(given((files[0], 1.0), (files[1], 0.5)), pipe)
    whole = merge_files(matched, make_merger("svd"), out, rank=4).blocks[-1]
    a, b, m = (torch.cat([delta.flatten() for delta in deltas(path, pipe).values()]).double() for path in (*files, out))
    b = b / 2
    assert whole.kept == pytest.approx((float(m @ a / (a @ a)), float(m @ b / (b @ b))), rel=1e-4)
    assert whole.overlaps == pytest.approx((float((a @ b) ** 2 / (a @ a) / (b @ b)),), rel=1e-4)
    assert whole.overlaps[0] > 0.2
    assert whole.energy == pytest.approx(float((m @ m) / ((a + b) @ (a + b))), rel=1e-4)
    assert whole.cut == pytest.approx(whole.energy, rel=1e-6)
    assert 0.5 < whole.cut < 0.999
    assert whole.norm == pytest.approx(float(m.norm()), rel=1e-4)
    assert (whole.layers, whole.ranks_before, whole.ranks_after) == (len(lora), (9, 9), (4, 4))


def test_files_of_one_family_are_matched_without_any_model(tmp_path: Path) -> None:
    down, up = torch.randn(4, 2048), torch.randn(1280, 4)
    save_file(
        {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, tmp_path / "diffusers.safetensors"
    )
    stem = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    kohya = {
        f"{stem}.lora_down.weight": down[:2],
        f"{stem}.lora_up.weight": up[:, :2].contiguous(),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    save_file(kohya, tmp_path / "kohya.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    files = [str(tmp_path / f"{name}.safetensors") for name in ("kohya", "diffusers")]
    out = tmp_path / "out.safetensors"
    result = run(app, ["merge", *files, "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = load_file(out)
    assert {key.rpartition(f"{stem}.")[2] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    scale = float(found[f"{stem}.alpha"]) / 6
    delta = scale * found[f"{stem}.lora_up.weight"] @ found[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(delta, up @ down + up[:, :2] @ down[:2] / 2, atol=1e-4, rtol=1e-4)


def flux(path: Path, rank: int, layers: tuple[str, ...] = ("img_attn_proj", "img_mlp_0"), width: int = 8) -> Path:
    tensors = {}
    for layer in layers:
        stem = f"lora_unet_double_blocks_3_{layer}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, width)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(width, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path, {"modelspec.architecture": "flux-1-dev/lora"})
    return path


def test_files_for_models_that_are_not_known_are_matched_by_their_own_names(tmp_path: Path) -> None:
    one = flux(tmp_path / "one.safetensors", 2)
    other = flux(tmp_path / "other.safetensors", 3, ("img_attn_proj",))
    out = tmp_path / "out.safetensors"
    result = run(app, ["merge", f"{one}:2", str(other), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "the model is unknown" in text_of(result)
    assert "model.double_blocks_3" in text_of(result)
    a, b, found = load_file(one), load_file(other), load_file(out)

    def delta(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
        stem = f"lora_unet_double_blocks_3_{layer}"
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        return float(tensors[f"{stem}.alpha"]) / len(down) * up @ down

    assert found.keys() == a.keys()
    expected = 2 * delta(a, "img_attn_proj") + delta(b, "img_attn_proj")
    torch.testing.assert_close(delta(found, "img_attn_proj"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta(found, "img_mlp_0"), 2 * delta(a, "img_mlp_0"), atol=1e-5, rtol=1e-5)


def test_diffusers_keys_of_a_transformer_stay_as_they_are(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, 6), f"{stem}.lora_B.weight": torch.randn(6, 2)}
    save_file(tensors, tmp_path / "one.safetensors")
    out = tmp_path / "out.safetensors"
    path = str(tmp_path / "one.safetensors")
    assert run(app, ["merge", path, f"{path}:-0.5", "--method", "svd", "--out", str(out)]).exit_code == 0
    found = load_file(out)
    assert found.keys() == tensors.keys()
    delta = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(delta, tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] / 2)
    assert found[f"{stem}.lora_A.weight"].shape == (2, 6)


def test_the_metadata_have_the_files_and_the_method_which_inspect_shows(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "playground:cat:0.7", "playground:dog", "--method", "ties", "--set", "density=0.5"]
    result = run(app, [*arguments, "--rank", "6", "--out", str(out)])
    assert result.exit_code == 0, result.output
    file = read_lora(out)
    record = json.loads(file.metadata["lora_compose.merge"])
    assert (record["method"], record["settings"], record["rank"]) == ("ties", {"density": 0.5}, 6)
    assert [one["weight"] for one in record["files"]] == [0.7, 1.0]
    assert [one["sha256"] for one in record["files"]] == [
        read_lora(playground_lora(name)).sha256 for name in ("cat", "dog")
    ]
    assert file.metadata["base_model"] == read_lora(playground_lora("cat")).metadata["base_model"]
    assert file.trigger is None  # there are two
    facts = json.loads(run(app, ["inspect", str(out), "--json"]).stdout)["files"][0]["facts"]
    (said,) = (text for label, text in facts if label == "merged by")
    assert said.startswith("ties (")
    assert "density=0.5" in said
    assert [text.rpartition(" ")[0] for label, text in facts if label == "merged from"] == [
        "cat.safetensors, weight 0.7, SHA-256", "dog.safetensors, weight 1.0, SHA-256",
    ]  # fmt: skip


def test_a_method_that_needs_a_model_looks_at_each_lora_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "playground:cat", "playground:dog", "--method", "ssr", "--steps", "2", "--out", str(out)]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    whole = json.loads(result.stdout)["blocks"][-1]
    assert all(0.2 < kept < 0.99 for kept in whole["kept"])


def test_moments_are_those_of_the_inputs_that_a_lora_alone_makes(write_lora: Callable[..., Path]) -> None:
    pipe, plain = FAMILIES["sd"](), FAMILIES["sd"](StableDiffusionPipeline)
    files = [write_lora(str(i), **loras) for i, loras in enumerate(two_loras(pipe))]
    matched = match_files(given((files[0], 1.0), (files[1], 0.5)), pipe)
    state = State(pipe)
    found = calibrate(pipe, matched.changes, ["a cat", "a dog"], make_merger("ssr"), steps=2, seed=3)
    state.assert_unchanged()
    plain.load_lora_weights(files[1], adapter_name="dog")
    plain.set_adapters("dog", 0.5)
    seen: dict[str, list[Tensor]] = {}
    layers = {"unet": ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"],
              "text_encoder": ["encoder.layers.1.self_attn.q_proj"]}  # fmt: skip
    for part, names in layers.items():
        for name in names:
            layer = getattr(plain, part).get_submodule(name)
            getattr(layer, "base_layer", layer).register_forward_pre_hook(
                lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0])
            )
    plain("a dog", num_inference_steps=2, guidance_scale=1.0, output_type="latent", generator=seeded(3))
    for part, names in layers.items():
        for name in names:
            changes = matched.changes[part, name]  # pyright: ignore[reportArgumentType]
            inputs = [F.unfold(x, 3, padding=1).movedim(1, -1) if x.ndim == 4 else x for x in seen[name]]
            rows = torch.cat([x.flatten(0, -2) for x in inputs])
            read = (rows @ torch.cat([change.down.flatten(1) for change in changes]).T).double()
            torch.testing.assert_close(found[part, name].alone[1], read.T @ read / len(read), atol=1e-5, rtol=1e-4)  # pyright: ignore[reportArgumentType]


def test_a_model_is_left_alone_also_where_the_call_fails(write_lora: Callable[..., Path]) -> None:
    pipe = FAMILIES["sd"]()
    matched = match_files(given((write_lora("one", unet=random_lora(pipe.unet, 1)), 1.0)), pipe)
    state = State(pipe)
    with pytest.raises(ValueError, match="prompt"):
        calibrate(pipe, matched.changes, [3], make_merger("ssr"))  # pyright: ignore[reportArgumentType]
    state.assert_unchanged()


@pytest.mark.parametrize("rank", [3000, 200_000])
def test_more_ranks_than_a_layer_can_need_cost_nothing(rank: int, tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(rank, 2), f"{stem}.lora_B.weight": torch.ones(3, rank)}
    save_file(tensors, tmp_path / "one.safetensors")
    out, path = tmp_path / "out.safetensors", str(tmp_path / "one.safetensors")
    result = run(app, ["merge", path, path, "--method", "tsv", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = load_file(out)
    delta = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(delta, torch.full((3, 2), float(rank)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat.safetensors", ("cat.safetensors", 1.0)),
        ("cat.safetensors:0.8", ("cat.safetensors", 0.8)),
        ("cat.safetensors:-1", ("cat.safetensors", -1.0)),
        ("playground:cat", ("playground:cat", 1.0)),
        ("playground:cat:.5", ("playground:cat", 0.5)),
        (r"C:\loras\cat.safetensors", (r"C:\loras\cat.safetensors", 1.0)),
    ],
)
def test_a_weight_stands_after_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


TWO = ["playground:cat", "playground:dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TWO, "--method", "sum"], "unknown method 'sum'; there are cat, svd"),
        ([*TWO, "--set", "density=1"], "cat has no settings ['density']; it has none"),
        ([*TWO, "--method", "ties", "--set", "density=2"], "density must be above 0 and at most 1"),
        ([*TWO, "playground:bear", "--method", "np"], "np takes two files, a subject and then a style; 3 were given"),
        (["playground:cat", "--method", "k-lora"], "k-lora takes two files"),
        ([*TWO, "--prompt", "a cat"], "cat generates no images; leave --prompt out"),
        ([*TWO, "--prompt", "a cat", "--method", "ssr"], "there are 1 prompts for 2 files"),
        ([*TWO, "--keys", "peft"], "--keys must be one of diffusers, kohya, not 'peft'"),
        ([*TWO, "--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, not 'int8'"),
        (["playground:cat:nan", "playground:dog"], "the weight is nan; expected a number such as 0.8"),
        (["playground:cat:0", "playground:dog:0"], "every weight is 0; there is nothing to merge"),
        ([*TWO, "playground:cat:1e9", "--dtype", "float16"], "that torch.float16 cannot hold; write float32"),
        (["nowhere.safetensors", "playground:dog"], "there is no file 'nowhere.safetensors'"),
        (["it.pt", "playground:dog"], "it.pt is a pickle"),
        ([*TWO, "--model", "nowhere"], "there is no model 'nowhere'"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_and_nothing_is_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(app, ["merge", *arguments, "--out", str(tmp_path / "folder" / "out.safetensors")])
    assert result.exit_code == 2, result.output
    assert message in text_of(result)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_a_name_that_is_taken(tmp_path: Path) -> None:
    (out := tmp_path / "out.safetensors").symlink_to("nowhere.safetensors")
    result = run(app, ["merge", *TWO, "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert "is there already" in text_of(result)
    assert run(app, ["merge", *TWO, "--out", str(out), "--overwrite"]).exit_code == 0
    assert out.is_file()
    assert not out.is_symlink()


def one_layer(path: Path, width: int = 768, outputs: int = 1280) -> Path:
    down, up = torch.ones(2, width), torch.ones(outputs, 2)
    save_file({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, path)
    return path


def damaged(path: Path) -> Path:
    one_layer(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def dora(path: Path) -> Path:
    tensors = load_file(one_layer(path))
    save_file(tensors | {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(1280)}, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: one_layer(path, 2048), "only LoRAs for the same model are merged: "),
        (lambda path: one_layer(path, 768, 640), "its change is 640 x 768, the model's weight 1280 x 768"),
        (damaged, "not a readable safetensors file"),
        (dora, "rescales or rotates the model's own weights (DoRA, OFT)"),
        (lambda path: flux(path, 2), "is for FLUX.1 or FLUX.2"),
        (lambda path: save_file({"weight": torch.ones(2)}, path) or path, "is not a LoRA"),
    ],
    ids=["another family", "another shape", "damaged", "DoRA", "Flux", "no LoRA"],
)  # fmt: skip
def test_files_that_cannot_be_merged_are_reported_and_nothing_is_written(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    one, other = one_layer(tmp_path / "one.safetensors"), make(tmp_path / "other.safetensors")
    result = run(app, ["merge", str(one), str(other), "--out", str(tmp_path / "out.safetensors")])
    assert result.exit_code == 2, result.output
    assert message in text_of(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "other.safetensors"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": ("txt_mlp_0",)}, "have no layer in common, as they name them"),
        ({"width": 9}, "the files do not fit each other: unet.double_blocks_3_img_attn_proj is changed by"),
    ],
)
def test_files_for_unknown_models_must_fit_each_other(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = [flux(tmp_path / "one.safetensors", 2), flux(tmp_path / "two.safetensors", 2, **other)]
    result = run(app, ["merge", *map(str, files), "--out", str(tmp_path / "out.safetensors")])
    assert result.exit_code == 2
    assert message in text_of(result)
    result = run(app, ["merge", str(files[0]), "--keys", "diffusers", "--out", str(tmp_path / "out.safetensors")])
    assert "so its layers keep their names" in text_of(result)


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    result = run(app, ["merge", *TWO, "--out", str(out)])
    assert result.exit_code == 2
    assert "is there already; choose another name, or add --overwrite" in text_of(result)
    assert out.read_bytes() == b"precious"
    assert run(app, ["merge", *TWO, "--out", str(out), "--overwrite"]).exit_code == 0
    assert read_lora(out).tensors
    result = run(app, ["merge", *TWO, "--out", str(tmp_path / "out.bin")])
    assert "expected one that ends in .safetensors" in text_of(result)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files as Unix does")
@pytest.mark.parametrize("size", [100, 1_050_000])
def test_a_disk_that_fills_up_leaves_what_was_there(size: int, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with files_of_at_most(size):
        result = run(app, ["merge", *TWO, "--out", str(out), "--overwrite"])
    assert result.exit_code == 1, result.output
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.safetensors", b"precious")]


@pytest.mark.slow
def test_the_sheet_of_the_playground_shows_pairs_merged_in_several_ways() -> None:
    shown = [[*images(pair, ["cat", "ssr"], steps=2)] for pair in PAIRS]
    assert [method for method, _ in shown[0]] == ["each alone", "cat", "ssr"]
    assert len({image.tobytes() for _, made in shown[0] for image in made}) == 9
    assert drawn(shown).height > 3 * shown[0][0][1][0].height


@pytest.mark.slow
def test_two_sdxl_files_of_500_mb_are_merged_in_less_than_2_gb(tmp_path: Path) -> None:
    files = []
    for n in range(2):
        generator = torch.Generator().manual_seed(n)
        tensors = {
            key: torch.randn([72 if side == 8 else side for side in shape], generator=generator).half()
            for key, shape in shapes_of(layout("kohya-sdxl")).items()
            if shape
        }
        files.append(tmp_path / f"{n}.safetensors")
        save_file(tensors, files[-1], layout("kohya-sdxl")["metadata"])
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "lora_compose", "merge", *map(str, files), "--out", str(out), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(path.stat().st_size > 5e8 for path in files)
    # What is written is as large again, and libraries take half a GB.
    report = json.loads(result.stdout)
    assert report["peak_bytes"] < 2e9
