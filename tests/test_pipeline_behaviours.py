"""What diffusers asks of every pipeline, of ours with concepts in every call.

Behaviours that diffusers' own suite asks for (the package does not bring it along), written anew: batches, outputs,
precision, devices and offloading, saving and opening, callbacks, encoded text. What cannot be combined with concepts is
in one table at the end, with the error that says so.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from components import EVERYTHING, FAMILIES, State, random_lora, seeded, text_loras
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.methods import LoraComposer
from lora_compose.pipelines.output import ComposeOutput
from lora_compose.pipelines.scene import Concept
from simulated_device import DEVICE, numbers, parameters_that_move

PLAIN = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPT = "a sks cat and a zwx dog"
CONCEPTS = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
POSITIONS = {"cat": [2], "dog": [6]}
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
UPDATES = LoraComposer(least_updates=1.0)

FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY = pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param("sd", "tara", id="sd-tara"),
        pytest.param("sd", UPDATES, id="sd-lora-composer"),
        pytest.param("sdxl", "tara", id="sdxl-tara"),
        pytest.param("sdxl", UPDATES, id="sdxl-lora-composer", marks=pytest.mark.slow),
    ],
)


@cache
def made(family: str) -> Any:
    """A tiny pipeline with the concepts "cat" and "dog"."""
    pipe = FAMILIES[family]()
    with_concepts(pipe)
    return pipe


def with_concepts(pipe: Any) -> Any:
    with TemporaryDirectory() as folder:
        for seed, (name, trigger) in enumerate({"cat": "sks", "dog": "zwx"}.items()):
            parts = {"unet": random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.1), **text_loras(pipe, seed)}
            tensors = {
                f"{part}.{layer}.lora_{side}.weight": tensor
                for part, lora in parts.items()
                for layer, factors in lora.items()
                for side, tensor in (("A", factors.down), ("B", factors.up))
            }
            path = Path(folder) / f"{name}.safetensors"
            save_file(tensors, path, metadata={"method": "tara"})
            pipe.load_concept(path, trigger=trigger, class_word=name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def family() -> str:
    """Which models, where a test does not ask for both."""
    return "sd"


@pytest.fixture
def composer(family: str) -> Any:
    """A tiny pipeline with two concepts, for one test."""
    return copy.deepcopy(made(family))


def called(pipe: Any, **arguments: Any) -> Any:
    given: dict[str, Any] = {
        "prompt": PROMPT, "concepts": CONCEPTS, "method": "tara", "num_inference_steps": 1, "guidance_scale": 4.0,
        "generator": seeded(), "output_type": "latent",
    }  # fmt: skip
    return pipe(**given | arguments)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return numbers(called(pipe, **arguments).images)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# Batches


@EVERY
def test_a_row_of_a_batch_is_the_image_of_its_own_call(family: str, method: Any) -> None:
    prompts = [PROMPT, "a zwx dog and a sks cat in snow", f"{PROMPT} on grass"]
    together = latents_of(
        made(family), method=method, prompt=prompts, negative_prompt=["dark", "", "blurry"],
        generator=[seeded(k) for k in range(3)],
    )  # fmt: skip
    assert together.shape == (3, 4, 16, 16)
    alone = latents_of(
        made(family), method=method, prompt=prompts[2], negative_prompt="blurry", generator=seeded(2)
    )  # fmt: skip
    assert_close(together[2:], alone)


@FAMILY
@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT], [PROMPT, PROMPT]], ids=["text", "one", "two"])
@pytest.mark.parametrize("images", [1, 2, None])
def test_there_are_as_many_images_as_asked_for(family: str, prompts: Any, images: int | None) -> None:
    count = (1 if isinstance(prompts, str) else len(prompts)) * (images or 1)
    found = called(made(family), prompt=prompts, num_images_per_prompt=images)
    assert found.images.shape == (count, 4, 16, 16)
    assert found.cost.rows_forward == 2 * count


@EVERY
def test_guidance_is_on_above_1_and_costs_a_row_of_its_own(composer: Any, family: str, method: Any) -> None:
    guided, without = (called(composer, method=method, guidance_scale=scale) for scale in (1.5, 1.0))
    assert guided.cost.rows_forward == 2 * without.cost.rows_forward
    assert not composer.do_classifier_free_guidance
    assert (guided.images - without.images).abs().max() > 1e-3


# Outputs


@EVERY
def test_dict_and_tuple_hold_the_same(family: str, method: Any) -> None:
    output = called(made(family), method=method, output_type="np")
    images, *rest = called(made(family), method=method, output_type="np", return_dict=False)
    assert isinstance(output, ComposeOutput)
    held: list[Any] = [output.images, output["images"], output[0]]
    assert all(np.array_equal(images, same) for same in held)
    assert rest == ([None] if family == "sd" else [])


@FAMILY
def test_all_kinds_of_output_show_the_same_image(family: str) -> None:
    as_np, as_pt, as_pil = (called(made(family), output_type=kind).images for kind in ("np", "pt", "pil"))
    assert as_np.shape == (1, 128, 128, 3)
    np.testing.assert_allclose(as_np, as_pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(as_np[0] * 255, np.asarray(as_pil[0], dtype=np.float32), atol=0.51)


@FAMILY
def test_the_vae_may_work_in_slices_and_tiles(composer: Any, family: str) -> None:
    arguments = {"output_type": "np", "num_images_per_prompt": 2}
    expected = called(composer, **arguments).images
    composer.vae.enable_slicing()
    np.testing.assert_allclose(called(composer, **arguments).images, expected, atol=1e-4)
    composer.vae.disable_slicing()
    composer.vae.enable_tiling()
    assert called(composer, width=192, **arguments).images.shape == (2, 128, 192, 3)


@EVERY
def test_freeu_changes_the_image_until_it_is_switched_off(composer: Any, family: str, method: Any) -> None:
    expected = latents_of(composer, method=method)
    composer.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (latents_of(composer, method=method) - expected).abs().max() > 1e-3
    composer.disable_freeu()
    assert torch.equal(latents_of(composer, method=method), expected)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # several hand tensors to numpy
@pytest.mark.parametrize("name", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
def test_every_scheduler_of_diffusers_makes_an_image_of_the_same_shape(composer: Any, name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    config = dict(composer.scheduler.config) | ({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
    composer.scheduler = getattr(diffusers, name).from_config(config)
    found = latents_of(composer, num_inference_steps=3)
    assert found.shape == (1, 4, 16, 16)
    assert found.isfinite().all()


# Precision


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near_to_single_precision(composer: Any, family: str, method: Any, dtype: Any) -> None:
    expected = latents_of(composer, method=method)
    composer.to(dtype)
    assert {model.dtype for model in models_of(composer).values()} == {dtype}
    found = latents_of(composer, method=method)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < (0.01 if dtype == torch.float16 else 0.05)


@FAMILY
def test_a_model_saved_in_half_precision_opens_so(composer: Any, family: str, tmp_path: Path) -> None:
    composer.to(torch.float16)
    expected = latents_of(composer)
    composer.save_pretrained(tmp_path)
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, dtype=torch.float16))
    assert {model.dtype for model in models_of(opened).values()} == {torch.float16}
    assert torch.equal(latents_of(opened), expected)


@FAMILY
def test_every_component_may_open_in_a_precision_of_its_own(family: str, tmp_path: Path) -> None:
    made(family).save_pretrained(tmp_path)
    given = {"vae": torch.bfloat16, "default": torch.float64}
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, dtype=given))
    assert {name: model.dtype for name, model in models_of(opened).items()} == {
        name: given.get(name, torch.float64) for name in models_of(opened)
    }
    start = torch.randn(1, 4, 16, 16, generator=seeded())
    latents = latents_of(opened, latents=start.double())
    assert latents.dtype == torch.float64
    assert_close(latents.float(), latents_of(made(family), latents=start), 1e-3)


# Devices


@EVERY
def test_a_pipeline_goes_to_a_device_and_back(composer: Any, family: str, method: Any) -> None:
    expected = latents_of(composer, method=method)
    with parameters_that_move():
        for place in (DEVICE, torch.device("cpu"), DEVICE):
            before = {name: dict(model.named_parameters()) for name, model in models_of(composer).items()}
            assert composer.to(place) is composer
            assert composer.device == place
            found = called(composer, method=method).images
            assert found.device == place
            assert_close(numbers(found), expected)
            for name, model in models_of(composer).items():
                assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {place}
                assert all(parameter is before[name][key] for key, parameter in model.named_parameters())


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=DEVICE)


def offload_layers(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device=DEVICE)


@EVERY
@pytest.mark.parametrize("offload", [offload_models, offload_layers])
def test_an_offloaded_pipeline_gives_the_same_image_again_and_again(
    composer: Any, family: str, method: Any, offload: Callable[[Any], None]
) -> None:
    expected = called(composer, method=method, output_type="np").images
    with parameters_that_move():
        offload(composer)
        for _ in range(2):
            assert composer._execution_device == DEVICE
            found = called(composer, method=method, output_type="np").images
            np.testing.assert_allclose(found, expected, atol=1e-4)
            places = {parameter.device.type for parameter in composer.unet.parameters()}
            assert places == {"meta" if offload is offload_layers else "cpu"}


@FAMILY
@pytest.mark.parametrize(
    "groups", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}],
    ids=["leaves", "blocks"],
)  # fmt: skip
def test_a_pipeline_offloaded_in_groups_gives_the_same_image(composer: Any, family: str, groups: Any) -> None:
    methods = ("tara", UPDATES, "tara")
    expected = [called(composer, method=method, output_type="np").images for method in methods]
    with parameters_that_move():
        composer.enable_group_offload(DEVICE, **groups)
        for method, images in zip(methods, expected, strict=True):
            np.testing.assert_allclose(called(composer, method=method, output_type="np").images, images, atol=1e-4)


# Saving, opening, sharing


@EVERY
def test_a_saved_pipeline_opens_and_composes_as_the_first_one(family: str, method: Any, tmp_path: Path) -> None:
    made(family).save_pretrained(tmp_path)
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path))
    assert torch.equal(latents_of(opened, method=method), latents_of(made(family), method=method))


@FAMILY
def test_a_variant_is_saved_and_opened_under_its_name_alone(composer: Any, family: str, tmp_path: Path) -> None:
    composer.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    weights = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, variant="fp16"))
    assert torch.equal(latents_of(opened), latents_of(composer))
    for wrong in (None, "bf16"):
        with pytest.raises((OSError, ValueError), match=r"safetensors|variant"):
            ComposePipeline.from_pretrained(tmp_path, variant=wrong)


@FAMILY
def test_optional_components_may_be_missing(composer: Any, family: str, tmp_path: Path) -> None:
    optional = [name for name in composer._optional_components if name not in ("text_encoder", "tokenizer")]
    kept = {name: part for name, part in composer.components.items() if name not in optional}
    if family == "sdxl":  # its second text encoder makes the pooled text
        kept |= {name: composer.components[name] for name in ("text_encoder_2", "tokenizer_2")}
    without = with_concepts(type(composer)(**dict.fromkeys(composer.components) | kept | QUIET[family]))
    expected = latents_of(without)
    without.save_pretrained(tmp_path)
    assert torch.equal(latents_of(with_concepts(ComposePipeline.from_pretrained(tmp_path))), expected)


QUIET = {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}


@EVERY
def test_components_build_the_pipeline_again(family: str, method: Any) -> None:
    again = with_concepts(type(made(family))(**made(family).components, **QUIET[family]))
    assert again.components.keys() == made(family).components.keys()
    assert all(again.components[name] is part for name, part in made(family).components.items())
    assert torch.equal(latents_of(again, method=method), latents_of(made(family), method=method))


@EVERY
@pytest.mark.parametrize("offloaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pipelines_made_of_each_other_share_models_and_settings(
    composer: Any, family: str, method: Any, offloaded: bool
) -> None:
    """From plain to ours, to plain, to ours again, also if models are brought to the device only when needed."""
    composed = numbers(called(composer, method=method).images)
    plain = PLAIN[family].from_pipe(composer)
    plain.set_progress_bar_config(disable=True)
    again = with_concepts(ComposePipeline.from_pipe(plain))
    for made_of in (plain, again):
        assert {name: value for name, value in made_of.config.items() if not name.startswith("_")} == {
            name: value for name, value in composer.config.items() if not name.startswith("_")
        }
        assert all(made_of.components[name] is part for name, part in composer.components.items())
    uncomposed = {"concepts": None, "method": None}
    expected = latents_of(composer, **uncomposed)
    arguments = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent"}
    with parameters_that_move():
        if offloaded:
            plain.enable_model_cpu_offload(device=DEVICE)
            assert_close(numbers(plain(PROMPT, generator=seeded(), **arguments).images), expected)
            plain.remove_all_hooks()
            again.enable_model_cpu_offload(device=DEVICE)
        for _ in range(2):
            assert_close(latents_of(again, method=method), composed)
            assert_close(latents_of(again, **uncomposed), expected)
        if not offloaded:
            assert torch.equal(plain(PROMPT, generator=seeded(), **arguments).images, expected)


# Encoded text


def encoded(pipe: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = pipe.encode_prompt(
            PROMPT, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt="dark",
        )  # fmt: skip
    return dict(zip(EMBEDDINGS, found, strict=False))


@FAMILY
@pytest.mark.parametrize("method", ["tara", "regional"])
def test_text_encoded_by_itself_composes_as_the_prompt(family: str, method: Any) -> None:
    """Of a pipeline with text encoders alone, in one without them."""
    composer = made(family)
    texts = {name for name in composer.components if name.startswith(("text_encoder", "tokenizer"))}
    parts, nothing = composer.components, dict.fromkeys(composer.components)
    only_text = type(composer)(**nothing | {name: parts[name] for name in texts}, **QUIET[family])
    no_text = type(composer)(**parts | dict.fromkeys(texts), **QUIET[family])
    with_concepts(no_text)
    found = latents_of(no_text, method=method, prompt=None, token_positions=POSITIONS, **encoded(only_text))
    assert torch.equal(found, latents_of(composer, method=method, negative_prompt="dark"))


# Callbacks


@EVERY
def test_callbacks_see_what_they_ask_for_and_have_the_last_word(family: str, method: Any) -> None:
    composer = made(family)
    seen: list[set[str]] = []

    def clear_at_the_end(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(set(tensors))
        latents = tensors["latents"]
        return {"latents": torch.zeros_like(latents) if step == pipe.num_timesteps - 1 else latents}

    for names in (["latents"], composer._callback_tensor_inputs):
        cleared = latents_of(
            composer, method=method, num_inference_steps=2, callback_on_step_end=clear_at_the_end,
            callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip
        assert seen == [set(names)] * 2
        assert not cleared.any()
        seen.clear()


@EVERY
def test_callbacks_may_raise_the_guidance(family: str, method: Any) -> None:
    composer = made(family)

    def more(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale += 1.0
        return tensors

    constant = latents_of(composer, method=method, num_inference_steps=2)
    raised = latents_of(composer, method=method, num_inference_steps=2, callback_on_step_end=more)
    assert composer.guidance_scale == 4.0 + 2
    assert (raised - constant).abs().max() > 1e-3


@EVERY
def test_an_interrupted_call_gives_what_there_is(family: str, method: Any) -> None:
    composer, kept = made(family), []

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    found = latents_of(composer, method=method, num_inference_steps=4, callback_on_step_end=stop)
    assert len(kept) == 2
    assert torch.equal(found, kept[1])


# What cannot be combined with concepts

ONE = torch.zeros(1, 32, 24)
REFUSED: dict[str, tuple[Mapping[str, Any], type[Exception], str]] = {
    "IP-Adapter images": ({"ip_adapter_image": Image.new("RGB", (8, 8))}, ValueError, "IP-Adapter images"),
    "IP-Adapter embeddings": ({"ip_adapter_image_embeds": [ONE]}, ValueError, "IP-Adapter images"),
    "arguments of attention": ({"cross_attention_kwargs": {"gligen": {}}}, ValueError, "only 'scale' can"),
    "the old callback": ({"callback": print, "callback_steps": 1}, TypeError, "unknown arguments: callback"),
    "unknown arguments": ({"strength": 0.5}, TypeError, "unknown arguments: strength"),
    "callback tensors that there are not": (
        {"callback_on_step_end_tensor_inputs": ["noise_pred"]}, ValueError, "noise_pred",
    ),
    "another text from a callback": (
        {
            "callback_on_step_end": lambda pipe, step, t, tensors: {"prompt_embeds": tensors["prompt_embeds"] * 2},
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }, ValueError, "the callback changed prompt_embeds",
    ),
    "prompt and embeddings": ({"prompt_embeds": ONE}, ValueError, "Cannot forward both `prompt`"),
    "neither prompt nor embeddings": ({"prompt": None}, ValueError, "Provide either `prompt` or `prompt_embeds`"),
    "positions with a prompt": ({"token_positions": POSITIONS}, ValueError, "token_positions go with prompt_embeds"),
    "a size that is no multiple of 8": ({"height": 60}, ValueError, "divisible by 8"),
    "timesteps that the scheduler does not take": ({"timesteps": [900, 1]}, ValueError, "custom timestep"),
    "timesteps and sigmas": ({"timesteps": [9], "sigmas": [1.0]}, ValueError, "Only one of `timesteps` or `sigmas`"),
    "fewer generators than images": ({"generator": [seeded()] * 3}, ValueError, "list of generators of length 3"),
    "embeddings for a method that writes texts": (
        {"method": UPDATES, "embedded": True}, ValueError, "needs the prompt as text, not embeddings",
    ),
    "updates in inference mode": (
        {"method": UPDATES, "inference_mode": True}, RuntimeError, r"outside torch.inference_mode\(\)",
    ),
}  # fmt: skip


@FAMILY
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_with_concepts_is_refused_and_changes_nothing(family: str, case: str) -> None:
    composer = made(family)
    arguments, error, message = dict(REFUSED[case][0]), *REFUSED[case][1:]
    inference = arguments.pop("inference_mode", False)
    if arguments.pop("embedded", False):
        arguments |= {"prompt": None, **encoded(composer)}
    elif family == "sdxl" and "prompt_embeds" in arguments:
        arguments["pooled_prompt_embeds"] = ONE[:, 0, :12]
    before = State(composer)
    with torch.inference_mode(inference), pytest.raises(error, match=message):
        called(composer, **arguments)
    before.assert_unchanged()


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "attention slicing": (
        lambda pipe: pipe.enable_attention_slicing(1), lambda pipe: pipe.disable_attention_slicing(),
        r"SlicedAttnProcessor.*disable_attention_slicing",
    ),
    "fused projections": (
        lambda pipe: pipe.fuse_qkv_projections(vae=False), lambda pipe: pipe.unfuse_qkv_projections(vae=False),
        r"fused projections.*unfuse_qkv_projections",
    ),
}  # fmt: skip


@FAMILY
@pytest.mark.parametrize("case", CHANGES)
def test_changes_of_attention_that_ours_would_lose_are_refused_until_undone(
    composer: Any, family: str, case: str
) -> None:
    expected = latents_of(composer)
    change, undo, message = CHANGES[case]
    change(composer)
    with pytest.raises(ValueError, match=message):
        called(composer)
    assert latents_of(composer, concepts=None, method=None).isfinite().all()
    undo(composer)
    assert torch.equal(latents_of(composer), expected)
