"""What the nodes tell ComfyUI of themselves, on a stand-in; and what they need of it."""

import ast
import asyncio
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_stand_in import OURS, Clip, ModelPatcher, Recorded, patcher, sampled, standing_in, text
from comfy_workflows import CORE_NODES, EXAMPLES, as_asked, example
from lora_compose.compose.comfyui import needed, words
from lora_compose.compose.comfyui.concepts import NodeConcept

FOLDER = Path(needed.__file__).parent
DOCS = (Path(__file__).resolve().parents[3] / "docs/comfyui.md").read_text(encoding="utf-8")
LABELS = {
    "Concept": "Concept", "Boxes": "Boxes", "Compose": "Compose", "DraftPreview": "Draft preview",
    "Refine": "Refine subject", "Merge": "Merge to file", "Inspect": "Inspect file",
}  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> Iterator[ModuleType]:
    with standing_in() as module:
        yield module("nodes")


@pytest.fixture(scope="module")
def schemas(ours: ModuleType) -> dict[str, Any]:
    nodes = asyncio.run(ours.Extension().get_node_list())
    found = [node.define_schema() for node in nodes]
    return {schema.node_id: schema for schema in found}


def told(schema: Any) -> dict[str, Any]:
    """A schema as ComfyUI's server tells it."""
    about: dict[str, Any] = {"input": {}, "input_order": {}}
    for one in schema.inputs:
        side = "optional" if one.options.get("optional") else "required"
        about["input"].setdefault(side, {})[one.id] = [one.kind, one.options]
        about["input_order"].setdefault(side, []).append(one.id)
    about["output"] = [output.kind for output in schema.outputs]
    about["output_name"] = [output.options.get("display_name", output.kind) for output in schema.outputs]
    return about


def test_the_nodes_have_the_labels_and_the_inputs_of_the_guide(schemas: dict[str, Any]) -> None:
    assert {name: schema.display_name for name, schema in schemas.items()} == {
        f"LoraCompose{name}": label for name, label in LABELS.items()
    }
    for schema in schemas.values():
        (row,) = re.findall(rf"^\| {schema.display_name} \| (.*)$", DOCS, re.MULTILINE)
        for one in schema.inputs:
            sampling = one.id in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "latent_image")
            plain = one.id in ("positive", "negative", "model") and "`" not in one.id
            assert f"`{one.id}`" in row or sampling or plain, (schema.display_name, one.id)
        assert schema.description
        assert schema.category == "lora-compose"


def test_what_is_optional_has_a_default_or_is_a_connection(schemas: dict[str, Any], ours: ModuleType) -> None:
    """Workflows of before have no value for inputs that are newer than they are."""
    concept = schemas["LoraComposeConcept"]
    assert [one.id for one in concept.inputs] == [
        "lora", "trigger", "class_word", "weight", "box", "prompt", "schedule", "mask", "concepts"
    ]  # fmt: skip
    required = [one.id for one in concept.inputs if not one.options.get("optional")]
    assert required == ["lora", "trigger", "class_word", "weight", "box"]
    (method,) = (one for one in schemas["LoraComposeCompose"].inputs if one.id == "method")
    assert method.options["options"] == ["auto", *words.METHODS]
    assert all(name in method.options["tooltip"] for name in words.METHODS)
    outputs = [output.kind for output in schemas["LoraComposeCompose"].outputs]
    assert outputs == ["MODEL", "CONDITIONING", "MASK"], "new ones come last"
    files = concept.inputs[0].options["options"]
    assert files[:2] == ["none (a subject without a LoRA)", "bird.safetensors"], "workflows keep the words"
    assert isinstance(concept.inputs[0], Recorded)


def test_a_chain_of_concepts_gets_boxes_and_masks(ours: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.folder_paths, "get_full_path_or_raise", lambda kind, name: f"/{kind}/{name}")
    given = {"trigger": "sks", "class_word": "cat", "weight": 1.0, "box": ""}
    (one,) = ours.ConceptNode.execute("cat.safetensors", **given).args
    (both,) = ours.ConceptNode.execute("dog.safetensors", one, **given, schedule="1..0", mask=None).args
    assert [concept.path.as_posix() for concept in both] == ["/loras/cat.safetensors", "/loras/dog.safetensors"]
    assert [concept.weight.constant for concept in both] == [1.0, None]
    (more,) = ours.ConceptNode.execute("other/cat.safetensors", both, **given).args
    assert [concept.scene.name for concept in more] == ["cat.safetensors", "dog.safetensors", "cat.safetensors (2)"]
    placed, masks = ours.BoxesNode.execute(both, "0,0,0.5,1\nnone").args
    assert masks.mean(dim=(1, 2)).tolist() == [0.5, 1]
    monkeypatch.setattr(ours, "composed", lambda *given: given[-2:])
    *_, shown = ours.ComposeNode.execute("model", "clip", placed, "a sks cat", "regional").args
    assert torch.equal(shown, masks)


@pytest.fixture
def two(ours: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A chain of two concepts, of files with LoRAs of all layers."""
    torch.manual_seed(0)
    for name in ("cat", "dog"):
        tensors = {}
        for layer, module in patcher().model.diffusion_model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() > 1:
                tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, *weight.shape[1:]) * 0.1
                ones = [1] * (weight.dim() - 2)
                tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(len(weight), 2, *ones)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(ours.folder_paths, "get_full_path_or_raise", lambda kind, name: tmp_path / name)
    given = {"weight": 1.0, "box": ""}
    (one,) = ours.ConceptNode.execute("cat.safetensors", trigger="sks", class_word="cat", **given).args
    return ours.ConceptNode.execute("dog.safetensors", one, trigger="zwx", class_word="dog", **given).args[0]


@pytest.fixture
def beside(ours: ModuleType, two: Any) -> Any:
    """The first of them, and a dog without a LoRA."""
    given = {"trigger": "", "class_word": "dog", "weight": 1.0, "box": ""}
    return ours.ConceptNode.execute(words.NO_LORA, two[:1], **given).args[0]


TEXT = "a sks cat beside a (zwx dog:1.2)"


def test_the_nodes_run_from_files_to_latents(ours: ModuleType, two: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lora_compose")
    model, clip, negative = patcher(), Clip(), text(2)
    base, found = sampled(model, clip.encode_from_tokens_scheduled(clip.tokenize(TEXT)), negative), {}
    placed, _ = ours.BoxesNode.execute(two, "0,0,0.5,1\n0.5,0,1,1").args
    ways = {"regional": placed, "regions": placed, "draft": two, "auto": two, "tara": two, "merge": two}
    for method, concepts in ways.items():
        given = ("regional", method) if method == "regions" else (method,)
        ours_, positive, _ = ours.ComposeNode.execute(model, clip, concepts, TEXT, *given).args
        found[method] = sampled(ours_, positive, negative)
        assert (found[method] - base).abs().max() > 0.01
    assert "method: draft, because the prompt names every concept by trigger and class word" in caplog.text
    assert torch.equal(found["auto"], found["draft"])
    del found["auto"]
    assert all((one - other).abs().max() > 0.01 for a, one in found.items() for b, other in found.items() if a != b)


def test_a_checkpoint_without_a_clip_is_told_in_words(ours: ModuleType, two: Any) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint has no CLIP, .* connect that of a CLIP loader"):
        ours.ComposeNode.execute(patcher(), None, two, TEXT, "merge")


def test_loras_keep_off_a_subject_without_one(ours: ModuleType, two: Any, beside: Any) -> None:
    """The latents are those with a LoRA of weight 0 in its place."""
    model, clip, negative, plain = patcher(), Clip(), text(2), "a sks cat beside a dog"

    def made(concepts: Any, *how: str) -> Any:
        ours_, positive, _ = ours.ComposeNode.execute(model, clip, concepts, plain, *how).args
        return sampled(ours_, positive, negative)

    # Factors of two LoRAs and of one lie apart otherwise in memory, and some processors then add up in another order.
    same = partial(torch.allclose, atol=1e-5)
    weightless = [two[0], NodeConcept.of(two[1].path, "", "dog", 0.0)]
    for texts in ("shared", "regions"):
        found, known = (
            made(ours.BoxesNode.execute(concepts, "0,0,0.5,1\n0.5,0,1,1").args[0], "regional", texts)
            for concepts in (beside, weightless)
        )
        assert same(found, known)
        alone = made(ours.BoxesNode.execute(two[:1], "0,0,0.5,1").args[0], "regional", texts)
        assert same(found, alone) == (texts == "shared"), "its region reads a text of its own"
    assert same(made(beside, "draft"), made(weightless, "draft"))
    assert torch.equal(made(beside, "auto"), made(beside, "draft"))
    for method in ("merge", "tara"):
        assert same(made(beside, method), made(two[:1], method))
    nothing = made([beside[1]], "merge")
    assert torch.equal(nothing, sampled(model, clip.encode_from_tokens_scheduled(clip.tokenize(plain)), negative))


def test_a_draft_is_shown_and_subjects_are_repainted(
    ours: ModuleType, two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ModelPatcher] = []

    def ksampler(model: ModelPatcher, positive: Any, negative: Any, latent: Any, **how: Any) -> Any:
        made.append(model)
        return ({"samples": sampled(model, positive, negative, **how)},)

    monkeypatch.setattr(ours.core, "common_ksampler", ksampler)
    model, clip, negative = patcher(), Clip(), text(2)
    drafting, positive, _ = ours.ComposeNode.execute(model, clip, two, TEXT, "draft").args
    shown = ours.DraftPreviewNode.execute(drafting, positive, negative, None, steps=5)
    images, masks = shown.args
    assert len(images) == 3, "the division, and a map of each subject"
    assert masks.shape == (2, 64, 96), "as large as the image"
    vae = SimpleNamespace(encode=lambda part: part, decode=lambda latents: latents.movedim(1, -1)[..., :3].sigmoid())
    before = torch.rand(1, 64, 96, 3)
    (after,) = ours.RefineNode.execute(before, model, clip, vae, negative, two, TEXT, 64, masks, steps=2).args
    assert len(made) == 3
    assert after.shape == before.shape
    assert (after - before).abs().mean() > 0.01


def test_each_image_keeps_its_own_subject_with_a_vae_of_videos(
    ours: ModuleType, two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a VAE takes a batch of images as frames, and makes one latent of the first ones."""
    vae = SimpleNamespace(
        encode=lambda images: images[:1].movedim(-1, 0)[None],
        decode=lambda latents: latents.movedim(1, -1),  # with a dimension of frames
    )
    monkeypatch.setattr(ours, "composed", lambda *given: (None, None))
    monkeypatch.setattr(ours, "_sample", lambda model, positive, negative, latent: latent["samples"])
    before = torch.arange(3).reshape(3, 1, 1, 1).expand(-1, 64, 64, 3) / 4
    masks = torch.ones(2, 64, 64)
    (after,) = ours.RefineNode.execute(before, None, Clip(), vae, None, two, TEXT, 64, masks).args
    assert torch.allclose(after, before, atol=1e-3), "what is painted is what was there"


def test_a_file_is_merged_of_the_loras_of_a_chain(
    ours: ModuleType, two: Any, beside: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A subject without one adds nothing."""
    files = import_module(f"{OURS}.file_nodes")
    monkeypatch.setattr(files.folder_paths, "get_output_directory", lambda: tmp_path)
    monkeypatch.setattr(files.folder_paths, "get_save_image_path", lambda name, folder: (str(folder), name, 1))
    said = []
    for name, concepts in (("plain", two), ("beside", [two[0], beside[1], two[1]])):
        said.append(files.MergeNode.execute(patcher(), concepts, "cat", name).args[0].replace(name, ""))
    assert said[0] == said[1]
    merged = [load_file(tmp_path / f"{name}_00001_.safetensors") for name in ("plain", "beside")]
    assert all(torch.equal(tensor, merged[1][key]) for key, tensor in merged[0].items())
    with pytest.raises(ValueError, match="there is nothing to merge: chain two concepts with LoRAs or more"):
        files.MergeNode.execute(patcher(), beside, "cat", "none")


def test_a_dora_is_merged_as_its_change_of_the_weights_of_the_checkpoint(
    two: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ComfyUI has left those of a LoRA loader in the model, and takes them out where it unloads that."""
    files, model = import_module(f"{OURS}.file_nodes"), patcher()
    name, path = "input_blocks.1.1.attn1.to_q", tmp_path / "cat.safetensors"
    layer, unloaded = model.model.diffusion_model.get_submodule(name), []
    before = layer.weight.clone()

    def unload() -> None:
        unloaded.append(len(unloaded))
        layer.weight.copy_(before)

    monkeypatch.setattr(files.comfy.model_management, "unload_all_models", unload)
    monkeypatch.setattr(files.folder_paths, "get_output_directory", lambda: tmp_path)
    monkeypatch.setattr(files.folder_paths, "get_save_image_path", lambda name, folder: (str(folder), name, 1))
    files.MergeNode.execute(model, two, "cat", "low rank")
    assert not unloaded, "low-rank changes are the same for all weights"
    save_file({**load_file(path), f"diffusion_model.{name}.dora_scale": torch.rand(8, 1) + 0.5}, path)
    for called, change in (("plain", 0.0), ("patched", 0.3)):
        layer.weight.add_(change)
        files.MergeNode.execute(model, two, "cat", called)
    assert len(unloaded) == 2
    merged = [load_file(tmp_path / f"{name}_00001_.safetensors") for name in ("plain", "patched")]
    assert all(torch.equal(tensor, merged[1][key]) for key, tensor in merged[0].items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_drawn_with_the_nodes_as_they_are(schemas: dict[str, Any], name: str) -> None:
    known = {**CORE_NODES, **{kind: told(schema) for kind, schema in schemas.items()}}
    asked, api = as_asked(example(name), known), example(f"{name}-api")
    numbers = dict(zip(api, asked, strict=True))
    linked = json.loads(json.dumps(api), object_hook=lambda found: renumbered(found, numbers))
    assert asked == {numbers[node]: of for node, of in linked.items()}


def renumbered(found: dict[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: [numbers[value[0]], value[1]] if isinstance(value, list) else value for key, value in found.items()}


def test_all_that_is_used_of_comfyui_is_looked_up_first() -> None:
    """Names that are imported from it, and attributes of its modules."""
    for path in FOLDER.glob("*.py"):
        tree, modules = ast.parse(path.read_text(encoding="utf-8")), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias for alias in node.names if alias.name in needed.NEEDED]
                modules |= {alias.asname or alias.name: alias.name for alias in names}
            elif isinstance(node, ast.ImportFrom) and node.module in needed.NEEDED:
                for alias in node.names:
                    of = [name for name in needed.NEEDED[node.module] if name.split(".")[0] == alias.name]
                    assert of, (path.name, alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in ("comfy", "comfy_api", "comfy_extras"), path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))):
                found = [name.split(".")[0] for name in needed.NEEDED[module]]
                assert node.attr in found, (path.name, node.attr)


def test_an_older_comfyui_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_compose.compose.comfyui.entry import comfy_entrypoint

    with standing_in():
        assert type(asyncio.run(comfy_entrypoint())).__name__ == "Extension"
        patcher = sys.modules["comfy.model_patcher"].ModelPatcher
        without = {name: getattr(patcher, name) for name in ("clone", "set_attachments", "get_attachment")}
        monkeypatch.setattr(sys.modules["comfy.model_patcher"], "ModelPatcher", SimpleNamespace(**without))
        said = r"ComfyUI 0\.3\.64 or later: this one has no comfy\.model_patcher\.ModelPatcher\.set_additional_models"
        with pytest.raises(RuntimeError, match=said):
            asyncio.run(comfy_entrypoint())
    monkeypatch.setitem(sys.modules, "comfy.lora", None)
    with pytest.raises(RuntimeError, match=r"this one has no comfy\.lora\.model_lora_keys_unet; update ComfyUI"):
        asyncio.run(comfy_entrypoint())
