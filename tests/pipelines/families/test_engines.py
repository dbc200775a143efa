"""Serving engines call a diffusers pipeline whole, with plain JSON: the images are those of the same calls in Python.

The calling sequences are those of the diffusers back ends of vLLM-Omni and SGLang, as docs/engines.md describes them.
"""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from components import lora_tensors, random_lora, tiny_pipeline
from engines import CUSTOM_PIPELINE, sglang_folder
from flux import flux_pipeline
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog"
WORDS = {"cat": "sks", "dog": "zwx"}
BOXES = {"cat": [0, 0, 64, 128], "dog": [64, 0, 128, 128]}
FITTING = ["draft", "regional", "tara", "merge", "switch", "composite", "freefuse"]
USUAL = ("draft",)
"""One that finds regions, and one that is given them; all methods are named in the same way."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, with two LoRAs beside it."""
    return saved(tiny_pipeline(), "unet", tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `model`, with a transformer."""
    return saved(flux_pipeline(), "transformer", tmp_path_factory.mktemp("transformer"))


def saved(pipe: Any, part: str, folder: Path) -> Path:
    pipe.save_pretrained(folder / "model")
    for seed, name in enumerate(WORDS):
        tensors = lora_tensors(**{part: random_lora(getattr(pipe, part), seed)})
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "model"


def fields(model: Path, *, boxed: bool = False) -> list[dict[str, Any]]:
    """The concepts of a request, as a program reads them from JSON."""
    found = [
        {"name": name, "lora": str(model.with_name(f"{name}.safetensors")), "trigger": word, "class_word": name}
        | ({"region": BOXES[name]} if boxed else {})
        for name, word in WORDS.items()
    ]
    return json.loads(json.dumps(found))


def by_vllm_omni(model: Path, load: dict[str, Any], defaults: dict[str, Any]) -> Callable[..., Any]:
    """vLLM-Omni's way: options of the command line for opening and for all calls, and requests with their prompts.

    What a pipeline's `__call__` does not name is left out. A request has its steps, guidance, size and seed always.
    """
    load = {"custom_pipeline": str(CUSTOM_PIPELINE), "trust_remote_code": True, **json.loads(json.dumps(load))}
    pipe: Any = DiffusionPipeline.from_pretrained(str(model), dtype=torch.float32, **load)
    pipe.to(torch.device("cpu"))
    accepted = set(inspect.signature(pipe.__call__).parameters)

    def request(*prompts: Any, seed: int = 0) -> Any:
        read = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
        extra = [prompt.get("multi_modal_data", {}) for prompt in read]
        if len(read) == 1:
            inputs = {"prompt": read[0]["prompt"], **extra[0]}
        else:
            inputs = {"prompt": [one["prompt"] for one in read]}
            inputs |= {name: [one[name] for one in extra] for name in extra[0]}
        sampling = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_rescale": 0.0, "eta": 0.0,
                    "width": 128, "height": 128, "num_frames": 1, "true_cfg_scale": 4.0}  # fmt: skip
        given = {name: value for name, value in {**defaults, **inputs, **sampling}.items() if name in accepted}
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.inference_mode():
            return pipe(**given, num_images_per_prompt=1, output_type="np", generator=generator).images

    return request


def by_sglang(model: Path) -> Callable[..., Tensor]:
    """SGLang's way: the folder alone is opened, so that it holds the pipeline's file; a request may have any arguments.

    A class that diffusers does not have is looked for in the folder. All arguments are passed on to pipelines whose
    `__call__` takes further ones.
    """
    load = {"dtype": torch.float32, "trust_remote_code": True, "revision": None}
    with pytest.raises(AttributeError, match="has no attribute CustomComposePipeline"):
        DiffusionPipeline.from_pretrained(str(model), **load)
    pipe: Any = DiffusionPipeline.from_pretrained(str(model), **load, custom_pipeline=str(model))

    def request(prompt: str, diffusers_kwargs: dict[str, Any], seed: int = 0) -> Tensor:
        given = {"prompt": prompt, "num_inference_steps": 2, "guidance_scale": 3.0, "height": 128, "width": 128}
        generator = torch.Generator("cpu").manual_seed(seed)
        given |= {"generator": generator, **json.loads(json.dumps(diffusers_kwargs)), "output_type": "pt"}
        with torch.no_grad(), warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            return pipe(**given).images

    return request


def in_python(model: Path, concepts: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    pipe: Any = ComposePipeline.from_pretrained(model)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 128, "height": 128, "output_type": "np"}
    return pipe(prompt=prompt, concepts=concepts, generator=torch.Generator().manual_seed(0), **call | options).images


def as_objects(found: list[dict[str, Any]]) -> list[Concept]:
    return [Concept(**one) for one in found]


@pytest.mark.parametrize("method", slow_but(USUAL, FITTING))
def test_vllm_omni_composes_with_concepts_in_json_bit_for_bit(method: str, model: Path, own_modules: None) -> None:
    given = fields(model, boxed=method == "regional")
    request = by_vllm_omni(model, {}, {"method": method})
    images = request({"prompt": PROMPT, "multi_modal_data": {"concepts": given}})
    assert (images == in_python(model, as_objects(given), method=method)).all()


def test_vllm_omni_composes_what_prompts_name_of_concepts_given_at_its_start(model: Path, own_modules: None) -> None:
    library = {one.pop("name"): one for one in fields(model)}
    request = by_vllm_omni(model, {"concepts": library}, {})
    plain = request("dummy run")  # as its warm-up, which names no concept
    assert (plain == in_python(model, None, "dummy run")).all()
    images = request(f"{PROMPT} <lora:cat:0.8> <lora:dog>")
    expected = [{**one, "weight": weight} for one, weight in zip(fields(model), (0.8, 1.0), strict=True)]
    assert (images == in_python(model, as_objects(expected))).all()


def test_several_requests_in_one_call_of_vllm_omni_have_concepts_of_their_own(model: Path, own_modules: None) -> None:
    cat, dog = fields(model)
    sets = [{cat.pop("name"): cat}, {dog.pop("name"): dog}]  # by name: it refuses lists of lists
    request = by_vllm_omni(model, {}, {"method": "merge"})
    prompts = ["a sks cat", "a zwx dog"]
    given = zip(prompts, sets, strict=True)
    images = request(*({"prompt": prompt, "multi_modal_data": {"concepts": one}} for prompt, one in given))
    expected = in_python(model, [[one] for one in as_objects(fields(model))], prompts, method="merge")
    assert (images == expected).all()


def test_a_transformer_composes_in_both_engines_bit_for_bit(
    transformer: Path, tmp_path: Path, own_modules: None
) -> None:
    given = fields(transformer)
    expected = in_python(transformer, as_objects(given), method="draft", output_type="pt")
    request = by_vllm_omni(transformer, {}, {"method": "draft"})
    images = request({"prompt": PROMPT, "multi_modal_data": {"concepts": given}})
    assert (images == expected.permute(0, 2, 3, 1).numpy()).all()
    request = by_sglang(sglang_folder(transformer, tmp_path / "model"))
    assert torch.equal(request(PROMPT, {"concepts": given, "method": "draft"}), expected)


def test_methods_that_take_gradients_are_refused_where_there_are_none(model: Path, own_modules: None) -> None:
    request = by_vllm_omni(model, {}, {})
    for method in ("lora-composer", "clora"):
        given = {"concepts": fields(model, boxed=True), "method": method}
        with pytest.raises(ValueError, match=f"{method} takes gradients.*use draft, regional, tara, merge or switch"):
            request({"prompt": PROMPT, "multi_modal_data": given})


def test_with_boxes_and_no_gradients_the_chosen_method_is_draft(model: Path, own_modules: None) -> None:
    request = by_vllm_omni(model, {}, {})
    given = fields(model, boxed=True)
    images = request({"prompt": PROMPT, "multi_modal_data": {"concepts": given}})
    assert (images == in_python(model, as_objects(given), method="draft")).all()


def test_sglang_composes_with_concepts_in_a_request_bit_for_bit(model: Path, tmp_path: Path, own_modules: None) -> None:
    request = by_sglang(sglang_folder(model, tmp_path / "model"))
    images = request(PROMPT, {"concepts": fields(model), "method": "tara"})
    assert torch.equal(images, in_python(model, as_objects(fields(model)), method="tara", output_type="pt"))
    with pytest.raises(TypeError, match="unknown argument 'true_cfg_scal'"):
        request(PROMPT, {"concepts": fields(model), "true_cfg_scal": 4})


def test_sglang_finds_the_concepts_that_the_folder_names(model: Path, tmp_path: Path, own_modules: None) -> None:
    library = {one.pop("name"): one for one in fields(model)}
    folder = sglang_folder(model, tmp_path / "model", concepts=library)
    images = by_sglang(folder)(PROMPT, {"concepts": "auto", "method": "merge"})
    assert torch.equal(images, in_python(model, as_objects(fields(model)), method="merge", output_type="pt"))
