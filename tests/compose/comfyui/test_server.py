"""ComfyUI's own server, without a browser, runs the example workflow with the nodes as `install` puts them there."""

import json
import os
import re
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_server import Ask, checkout, serving
from comfy_workflows import EXAMPLES, as_asked, example
from lora_compose.compose.comfyui.words import NO_LORA
from small_world import SIZE

pytestmark = pytest.mark.comfyui


def checkpoint(folder: Path) -> None:
    """Stable Diffusion 1.5 with a short UNet, random weights and no VAE; its text encoder has to be of full size."""
    core = import_module("comfy_models")  # puts ComfyUI on the path
    import comfy.ops  # pyright: ignore[reportMissingImports]
    import comfy.supported_models  # pyright: ignore[reportMissingImports]
    from comfy.clip_model import CLIPTextModel  # pyright: ignore[reportMissingImports]

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
        "channel_mult": (1, 1), "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1, "legacy": False, "use_spatial_transformer": True, "context_dim": 768,
        "use_linear_in_transformer": False, "use_temporal_attention": False, "adm_in_channels": None,
    }  # fmt: skip
    patcher = core.patcher_of(comfy.supported_models.SD15(config), torch.float32, None)
    weights = {
        f"model.{name}": weight.half() for name, weight in patcher.model.state_dict().items() if "diffusion" in name
    }
    sizes = json.loads((Path(os.environ["COMFYUI_PATH"]) / "comfy/sd1_clip_config.json").read_text())
    for name, weight in CLIPTextModel(sizes, torch.float32, "cpu", comfy.ops.disable_weight_init).state_dict().items():
        random = torch.randn(weight.shape) * 0.02 if weight.dim() > 1 else torch.full(weight.shape, "weight" in name)
        weights[f"cond_stage_model.transformer.{name}"] = random.half()
    save_file(weights, folder / "checkpoints/model.safetensors")
    for seed, name in enumerate(("cat", "dog", "bird", "style"), start=1):
        tensors = {key: value for key, value in core.tensors_of(patcher, seed, 2).items() if "attn" in key}
        for layer in range(12):  # files of the text encoder have its layers by these names
            start = f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1"
            tensors[f"{start}.lora_down.weight"] = torch.randn(2, 768) * 768**-0.5
            tensors[f"{start}.lora_up.weight"] = torch.randn(3072, 2) * 0.05
        save_file(tensors, folder / f"loras/{name}.safetensors")
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    of_flux = {f"{layer}.lora_A.weight": torch.ones(2, 3072), f"{layer}.lora_B.weight": torch.ones(3072, 2)}
    save_file(of_flux, folder / "loras/flux.safetensors")


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, with folders of its own for what is installed and made."""
    root = checkout(tmp_path_factory.mktemp("ComfyUI"))
    checkpoint(root / "models")
    return root


@pytest.fixture(scope="module")
def ask(comfyui: Path) -> Iterator[Ask]:
    """Asks the server; it runs until the tests are over."""
    with serving(comfyui) as (_, asked):
        yield asked


def workflow(name: str = EXAMPLES[0], **changes: Any) -> dict[str, Any]:
    """An example, smaller; it ends with latents, since the checkpoint has no VAE."""
    graph = example(f"{name}-api")
    del graph["decode"]
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "composed"}}
    graph["latent"]["inputs"] |= {"width": 128, "height": 128}
    graph["sampler"]["inputs"] |= {"steps": 3}
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    return graph


def run(ask: Ask, comfyui: Path, graph: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    number = ask("prompt", {"prompt": graph})["prompt_id"]
    while not (history := ask(f"history/{number}")):
        time.sleep(0.2)
    status = history[number]["status"]
    saved = list((comfyui / "output").rglob("composed*"))
    latent = load_file(saved[0])["latent_tensor"] if saved else None
    for path in saved:
        path.unlink()
    return status, latent


def plain(**changes: Any) -> dict[str, Any]:
    """The same text without our nodes."""
    graph = workflow()
    text = graph.pop("compose")["inputs"]["text"]
    for name in ("cat", "dog", "boxes"):
        del graph[name]
    graph["positive"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": text}}
    graph["sampler"]["inputs"] |= {"model": ["model", 0], "positive": ["positive", 0], **changes}
    return graph


def test_the_nodes_are_there_and_the_example_runs_twice(ask: Ask, comfyui: Path) -> None:
    kinds = {name.removeprefix("LoraCompose") for name in ask("object_info") if name.startswith("LoraCompose")}
    assert kinds == {"Concept", "Boxes", "Compose", "DraftPreview", "Refine", "Merge", "Inspect"}
    status, base = run(ask, comfyui, plain())
    assert status["status_str"] == "success", status
    status, first = run(ask, comfyui, workflow())
    assert status["status_str"] == "success", status
    assert base is not None
    assert first is not None
    assert (first - base).abs().max() > 0.01
    other, again = run(ask, comfyui, plain(seed=8)), run(ask, comfyui, plain(seed=7))  # else the result is a kept one
    assert other[0]["status_str"] == "success"
    assert again[1] is not None
    assert torch.equal(again[1], base), "the base model is bit-identical afterwards"
    run(ask, comfyui, workflow(sampler={"seed": 8}))
    _, second = run(ask, comfyui, workflow())
    assert second is not None
    assert torch.equal(second, first)


def in_small_world(name: str) -> dict[str, Any]:
    """An example with real weights, in core's own UNet."""
    graph = example(f"{name}-api")
    graph["model"] = {"class_type": "SmallWorld", "inputs": {}}
    graph["latent"]["inputs"] |= {"width": SIZE, "height": SIZE}
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"] |= {"steps": 8, "cfg": 4.0, "scheduler": "sgm_uniform"}
        if node["inputs"].get("lora", NO_LORA) != NO_LORA:
            node["inputs"]["lora"] = f"world/{node['inputs']['lora']}"
        if "size" in node["inputs"]:
            node["inputs"]["size"] = SIZE
    return graph


def newest(comfyui: Path, prefix: str) -> Tensor:
    """The image that was saved last under a name, in 0..255. Shape: [height, width, 3]."""
    path = max((comfyui / "output").glob(f"{prefix}*.png"), key=lambda path: path.stat().st_mtime)
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float()


def test_a_lora_of_the_small_world_changes_its_box(ask: Ask, comfyui: Path) -> None:
    """The half of the image with the box changes more than twice as much."""
    graph, images = in_small_world("two-in-boxes"), []
    graph["boxes"]["inputs"] |= {"boxes": "0,0,0.5,1", "concepts": ["cat", 0]}
    graph["compose"]["inputs"] |= {"text": "a xlo bear and a robot on sand", "texts": "shared"}
    del graph["dog"]
    for weight in (0.0, 1.0):
        graph["cat"]["inputs"] |= {
            "lora": "world/bear.safetensors", "trigger": "xlo", "class_word": "bear", "weight": weight
        }  # fmt: skip
        status, _ = run(ask, comfyui, graph)
        assert status["status_str"] == "success", status
        images.append(newest(comfyui, "two-in-boxes"))
    left, right = (images[1] - images[0]).abs().chunk(2, dim=1)
    assert left.mean() > 2 * right.mean() > 0


def test_subjects_are_repainted_where_the_draft_has_found_them(ask: Ask, comfyui: Path) -> None:
    graph = in_small_world("refined")
    graph["before"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "before"}}
    number = ask("prompt", {"prompt": graph})["prompt_id"]
    while not (history := ask(f"history/{number}")):
        time.sleep(0.2)
    assert history[number]["status"]["status_str"] == "success", history[number]["status"]
    assert len(history[number]["outputs"]["preview"]["images"]) == 3, "the division, and a map of each subject"
    assert (newest(comfyui, "refined") - newest(comfyui, "before")).abs().mean() > 1


def test_what_is_outside_of_the_box_of_a_subject_is_not_repainted(ask: Ask, comfyui: Path) -> None:
    graph = in_small_world("refined")
    graph["before"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "before"}}
    del graph["preview"], graph["refine"]["inputs"]["masks"], graph["dog"]
    graph["cat"]["inputs"]["box"] = "0,0,0.5,1"
    graph["compose"]["inputs"] |= {"method": "regional", "concepts": ["cat", 0]}
    graph["refine"]["inputs"]["concepts"] = ["cat", 0]
    status, _ = run(ask, comfyui, graph)
    assert status["status_str"] == "success", status
    left, right = (newest(comfyui, "refined") - newest(comfyui, "before")).abs().chunk(2, dim=1)
    assert left.mean() > 1
    assert not right.any()


def test_a_merged_file_acts_as_its_concepts_do(ask: Ask, comfyui: Path) -> None:
    """In `merge`, LoRAs act everywhere, and so does the file in a LoRA loader, to the precision of fp16."""
    _, wanted = run(ask, comfyui, workflow(compose={"method": "merge", "concepts": ["dog", 0]}))
    loras = {name: node for name, node in workflow().items() if name in ("model", "cat", "dog")}
    merge = {"model": ["model", 0], "concepts": ["dog", 0], "method": "cat", "filename_prefix": "loras/both"}
    graph = {**loras, "merge": {"class_type": "LoraComposeMerge", "inputs": merge}}
    assert "cat.safetensors, weight 1: kept" in said(ask, graph, "merge")
    name = "both_00001_.safetensors"
    assert "merged by: cat" in said(ask, {"file": inspecting(name)}, "file")
    _, base = run(ask, comfyui, plain())
    graph = plain()
    inputs = {"lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    graph["both"] = {"class_type": "LoraLoader", "inputs": {"model": ["model", 0], "clip": ["model", 1], **inputs}}
    graph["positive"]["inputs"]["clip"] = ["both", 1]
    graph["sampler"]["inputs"]["model"] = ["both", 0]
    status, found = run(ask, comfyui, graph)
    assert status["status_str"] == "success", status
    assert found is not None
    assert wanted is not None
    assert base is not None
    effect = (wanted - base).abs().max()
    assert effect > 0.01
    assert (found - wanted).abs().max() < 0.1 * effect


def test_a_file_for_another_model_is_told(ask: Ask) -> None:
    world = {"model": {"class_type": "SmallWorld", "inputs": {}}}
    found = said(ask, {**world, "file": inspecting("world/cat.safetensors", model=["model", 0])}, "file")
    assert "word: sks" in found
    assert re.search(r"fits: \d+ layers of this model are changed", found)
    found = said(ask, {**world, "file": inspecting("cat.safetensors", model=["model", 0])}, "file")
    assert "problem: cat.safetensors: " in found
    assert "has a side of 320, the model's layer has 96; choose a LoRA that was trained for this model" in found
    found = said(ask, {**world, "file": inspecting("flux.safetensors", model=["model", 0])}, "file")
    assert "problem: flux.safetensors fits this model in 0 of its 1 layers" in found


def inspecting(lora: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": "LoraComposeInspect", "inputs": {"lora": lora, **inputs}}


def said(ask: Ask, graph: dict[str, Any], node: str) -> str:
    """The text that a node shows."""
    number = ask("prompt", {"prompt": graph})["prompt_id"]
    while not (history := ask(f"history/{number}")):
        time.sleep(0.2)
    assert history[number]["status"]["status_str"] == "success", history[number]["status"]
    return history[number]["outputs"][node]["text"][0]


def test_a_mistake_is_told_in_the_answer(ask: Ask, comfyui: Path) -> None:
    status, _ = run(ask, comfyui, workflow(compose={"method": "tara"}))
    (failed,) = (message for kind, message in status["messages"] if kind == "execution_error")
    assert failed["node_type"] == "LoraComposeCompose"
    assert "tara does not use boxes and masks; take them away, or choose regional" in failed["exception_message"]


def test_merge_changes_the_text_encoder_as_lora_loaders_do(ask: Ask, comfyui: Path) -> None:
    """ComfyUI adds to weights in fp16, we to outputs."""
    status, merged = run(ask, comfyui, workflow(compose={"method": "merge", "concepts": ["dog", 0]}))
    assert status["status_str"] == "success", status
    found = {}
    for strength in (0.0, 1.0):  # of the text encoder
        graph, last = plain(), "model"
        for name in ("cat", "dog"):
            inputs = {"lora_name": f"{name}.safetensors", "strength_model": 1.0, "strength_clip": strength}
            graph[name] = {"class_type": "LoraLoader", "inputs": {"model": [last, 0], "clip": [last, 1], **inputs}}
            last = name
        graph["positive"]["inputs"]["clip"] = [last, 1]
        graph["sampler"]["inputs"]["model"] = [last, 0]
        status, found[strength] = run(ask, comfyui, graph)
        assert status["status_str"] == "success", status
    assert merged is not None
    assert found[0.0] is not None
    assert found[1.0] is not None
    effect = (found[1.0] - found[0.0]).abs().max()
    assert effect > 0.01
    assert (merged - found[1.0]).abs().max() < 0.1 * effect


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_opened_and_run(ask: Ask, comfyui: Path, name: str) -> None:
    asked, api = as_asked(example(name), ask("object_info")), example(f"{name}-api")
    numbers = dict(zip(api, asked, strict=True))
    for node in api.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][key] = [numbers[value[0]], value[1]]
    assert asked == {numbers[node]: of for node, of in api.items()}, "both files of an example are the same workflow"
    if name == "refined":  # needs a VAE, and is run above
        return
    one, other = 10 + 2 * EXAMPLES.index(name), 11 + 2 * EXAMPLES.index(name)  # the server keeps what it made last
    _, base = run(ask, comfyui, plain(seed=one))
    made = []
    for seed in (one, other, one):
        status, found = run(ask, comfyui, workflow(name, sampler={"seed": seed}))
        assert status["status_str"] == "success", status
        made.append(found)
    run(ask, comfyui, plain(seed=other))
    _, after = run(ask, comfyui, plain(seed=one))
    assert base is not None
    assert after is not None
    assert (made[0] - base).abs().max() > 0.01
    assert torch.equal(made[0], made[2])
    assert torch.equal(after, base), "the base model is bit-identical afterwards"
