"""LoRA Switch and LoRA Composite against loops by hand over diffusers' own adapters, one active at a time."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from safetensors.torch import save_file
from torch import Tensor

from comparisons import assert_close, far_apart
from components import EVERYTHING, lora_tensors, random_lora, seeded, tiny_pipeline, with_library
from lora_compose.pipelines.concepts.library import ConceptLibrary
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import Composite, Switch, make_method
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but

PROMPT = "a sks cat, a zwx dog, a xlo bear"
OTHER_PROMPT = "a xlo bear on a sks cat and a zwx dog"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "xlo"}
WEIGHTS = {"cat": 0.8, "dog": -0.5, "bear": 1.3}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
METHODS = ("switch", "composite")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs that change the UNet and the text encoder."""
    pipe, paths = tiny_pipeline(), {}
    for seed, name in enumerate(TRIGGERS):
        unet = random_lora(pipe.unet, seed, rank=2 + seed, scale=0.5, targets=EVERYTHING, size=0.15)
        text = random_lora(pipe.text_encoder, 10 + seed, targets=TEXT_LAYERS, size=0.2)
        paths[name] = tmp_path_factory.getbasetemp() / f"{name}-of-three.safetensors"
        save_file(lora_tensors(unet=unet, text_encoder=text), paths[name])
    return paths


@pytest.fixture(scope="module")
def library(files: dict[str, Path]) -> ConceptLibrary:
    """The concepts "cat", "dog" and "bear"."""
    pipe = tiny_pipeline()
    for name, path in files.items():
        pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name, weight=WEIGHTS[name])
    return pipe.library


@pytest.fixture
def pipe(library: ConceptLibrary) -> ComposeStableDiffusionPipeline:
    """A tiny pipeline with these concepts."""
    return with_library(tiny_pipeline(), library)


@pytest.fixture(scope="module")
def plain_pipe(files: dict[str, Path]) -> StableDiffusionPipeline:
    """diffusers' own pipeline with the same weights and LoRAs as adapters, which tests only switch."""
    pipe = tiny_pipeline(StableDiffusionPipeline)
    for name, path in files.items():
        pipe.load_lora_weights(path, adapter_name=name)
    return pipe


def compose(pipe: Any, **arguments: Any) -> Any:
    prompt = arguments.setdefault("prompt", PROMPT)
    images = (len(prompt) if isinstance(prompt, list) else 1) * arguments.get("num_images_per_prompt", 1)
    given = {
        "concepts": ["cat", "dog", "bear"], "num_inference_steps": 2, "output_type": "latent",
        "generator": [seeded(k) for k in range(images)],
    }  # fmt: skip
    return pipe(**given | arguments)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return compose(pipe, **arguments).images


class ByHand:
    """diffusers' UNet with one adapter at a time, and a denoising loop."""

    def __init__(
        self,
        pipe: Any,
        names: Sequence[str],
        prompts: Sequence[str] = (PROMPT,),
        images: int = 1,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
    ) -> None:
        self.pipe = pipe
        self.guidance_scale = guidance_scale
        self.images = len(prompts) * images
        self.text = {}
        for name in names:
            self.activate(name)
            negative = [negative_prompt] * len(prompts)
            self.text[name] = pipe.encode_prompt(list(prompts), torch.device("cpu"), images, True, negative)

    def activate(self, name: str) -> None:
        self.pipe.set_adapters([name], [WEIGHTS[name]])

    def predict(self, name: str, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the model says with one adapter, without and with the prompt."""
        self.activate(name)
        cond, uncond = self.text[name]
        without, given = self.pipe.unet(torch.cat([latents] * 2), t, torch.cat([uncond, cond])).sample.chunk(2)
        return without, given

    def guided(self, name: str, latents: Tensor, t: Tensor) -> Tensor:
        without, given = self.predict(name, latents, t)
        return given if self.guidance_scale <= 1 else without + self.guidance_scale * (given - without)

    @torch.no_grad()
    def denoise(self, steps: int, output: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Latents after a loop whose step gives the scheduler `output(step, latents, t)`."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps)
        latents = torch.cat([torch.randn(1, 4, 16, 16, generator=seeded(seed)) for seed in range(self.images)])
        for step, t in enumerate(scheduler.timesteps):
            latents = scheduler.step(output(step, latents, t), t, latents).prev_sample
        return latents


# Switch


@pytest.mark.parametrize(("concepts", "interval", "active"), [
    ("bear cat dog", 1, "bear cat dog bear"),
    ("cat dog", 2, "cat cat dog dog cat"),
    pytest.param("dog cat", 3, "dog dog", marks=pytest.mark.slow),
    pytest.param("bear", 2, "bear bear bear", marks=pytest.mark.slow),
])  # fmt: skip
def test_switch_equals_a_loop_with_one_adapter_at_a_time(pipe, plain_pipe, concepts, interval, active):
    turns = active.split()
    by_hand = ByHand(plain_pipe, concepts.split())
    expected = by_hand.denoise(len(turns), lambda step, latents, t: by_hand.guided(turns[step], latents, t))
    method = Switch(interval=interval)
    assert_close(latents_of(pipe, concepts=concepts.split(), method=method, num_inference_steps=len(turns)), expected)


def test_switch_changes_after_five_steps_if_not_told_otherwise():
    assert make_method("switch") == Switch(interval=5)


# Composite


@pytest.mark.parametrize(("shares", "concepts", "guidance_scale"), [
    (None, ["cat", "dog", "bear"], 7.5),
    pytest.param(None, ["cat"], 7.5, marks=pytest.mark.slow),
    ([1, 3], ["cat", "bear"], 1.0),
    ([0.5, 0, 2.5], ["cat", "dog", "bear"], 7.5),
])  # fmt: skip
def test_composite_equals_the_average_of_guided_predictions(pipe, plain_pipe, shares, concepts, guidance_scale):
    by_hand = ByHand(plain_pipe, concepts, guidance_scale=guidance_scale)
    ratios = dict(zip(concepts, shares or [1] * len(concepts), strict=True))

    def output(step: int, latents: Tensor, t: Tensor) -> Tensor:
        total = torch.zeros_like(latents)
        for name in concepts:
            total += ratios[name] * by_hand.guided(name, latents, t)
        return total / sum(ratios.values())

    method = Composite(shares=shares)
    found = latents_of(pipe, concepts=concepts, method=method, guidance_scale=guidance_scale)
    assert_close(found, by_hand.denoise(2, output))


def test_composite_with_rescaled_guidance_takes_the_averages_for_the_predictions(pipe, plain_pipe):
    names = ["cat", "dog", "bear"]
    by_hand = ByHand(plain_pipe, names)

    def output(step: int, latents: Tensor, t: Tensor) -> Tensor:
        said = [by_hand.predict(name, latents, t) for name in names]
        without, given = (torch.stack(part).mean(dim=0) for part in zip(*said, strict=True))
        guided = without + 7.5 * (given - without)
        return guided * (0.6 * given.std() / guided.std() + 0.4)  # one image, so the std is over everything

    found = latents_of(pipe, method="composite", guidance_rescale=0.6)
    assert_close(found, by_hand.denoise(2, output))
    assert far_apart(found, latents_of(pipe, method="composite"))


# Both


def outputs_of(method: str, by_hand: ByHand) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The predictions of cat and dog in a step, with an interval of 1."""

    def output(step: int, latents: Tensor, t: Tensor) -> Tensor:
        if method == "switch":
            return by_hand.guided(("cat", "dog")[step % 2], latents, t)
        return (by_hand.guided("cat", latents, t) + by_hand.guided("dog", latents, t)) / 2

    return output


PAIR: dict[str, Any] = {"concepts": ["cat", "dog"]}
OF_ONE_STEP = {"switch": Switch(interval=1), "composite": Composite()}


@pytest.mark.parametrize("method", slow_but(["composite"], METHODS))
def test_several_prompts_images_and_a_negative_prompt_reach_every_pass(pipe, plain_pipe, method):
    prompts = [PROMPT, OTHER_PROMPT]
    by_hand = ByHand(plain_pipe, ["cat", "dog"], prompts, images=2, negative_prompt="dark")
    output = compose(
        pipe, prompt=prompts, num_images_per_prompt=2, negative_prompt=["dark", "dark"], method=OF_ONE_STEP[method],
        **PAIR,
    )  # fmt: skip
    assert_close(output.images, by_hand.denoise(2, outputs_of(method, by_hand)))
    assert output.cost.rows_forward == 2 * (8 if method == "switch" else 16)


@pytest.mark.parametrize("method", slow_but(["composite"], METHODS))
def test_guidance_that_a_callback_switches_off_is_off_for_every_lora(pipe, plain_pipe, method):
    by_hand = ByHand(plain_pipe, ["cat", "dog"], guidance_scale=5.0)
    step_of = outputs_of(method, by_hand)

    def output(step: int, latents: Tensor, t: Tensor) -> Tensor:
        by_hand.guidance_scale = 5.0 if step <= 1 else 0.0
        return step_of(step, latents, t)

    composed = compose(
        pipe, method=OF_ONE_STEP[method], num_inference_steps=4, guidance_scale=5.0,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25), **PAIR,
    )  # fmt: skip
    assert_close(composed.images, by_hand.denoise(4, output))
    assert composed.cost.rows_forward == (2 * 2 + 2) * (1 if method == "switch" else 2)


@pytest.mark.parametrize(
    ("method", "texts", "steps"), [(Switch(interval=1), 3, 4), (Composite(), 3, 2), ("tara", 1, 2)]
)
def test_each_text_is_projected_once_and_once_more_without_guidance(pipe, method, texts, steps):
    """In so many steps that a text is read again."""
    counts: Counter[str] = Counter()
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    for name in layers:
        pipe.unet.get_submodule(name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    compose(pipe, method=method, num_inference_steps=steps)
    assert counts == dict.fromkeys(layers, texts)
    counts.clear()
    half = SDCFGCutoffCallback(cutoff_step_ratio=0.4)  # after so many steps as before, it is switched off
    compose(pipe, method=method, num_inference_steps=2 * steps, callback_on_step_end=half)
    assert counts == dict.fromkeys(layers, 2 * texts)


@pytest.mark.parametrize(("method", "concepts", "guidance_scale", "rows"), [
    ("switch", 3, 7.5, 4), ("switch", 3, 1.0, 2), ("composite", 3, 7.5, 12), ("composite", 3, 1.0, 6),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("switch", 1, 7.5, 4), ("composite", 1, 7.5, 4), ("composite", 2, 7.5, 8),
    )),
])  # fmt: skip
def test_rows_are_counted_and_no_pass_has_more_than_two(pipe, method, concepts, guidance_scale, rows):
    seen: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    output = compose(pipe, method=method, concepts=list(TRIGGERS)[:concepts], guidance_scale=guidance_scale)
    assert output.cost.rows_forward == sum(seen) == rows
    assert set(seen) == {2 if guidance_scale > 1 else 1}


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_see_the_text_of_the_first_lora(pipe, plain_pipe, method):
    seen = {}

    def look(pipe, step, timestep, tensors):
        seen.update(tensors)
        return tensors

    compose(
        pipe, method=method, concepts=["dog", "cat"], callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"],
    )  # fmt: skip
    cond, uncond = ByHand(plain_pipe, ["dog"]).text["dog"]
    assert_close(seen["prompt_embeds"], torch.cat([uncond, cond]))
    assert_close(seen["negative_prompt_embeds"], uncond)


@pytest.mark.parametrize("method", METHODS)
def test_recorded_maps_are_those_of_the_loras_that_acted(pipe, method):
    arguments = {"num_inference_steps": 1, "record_attention": True, "num_images_per_prompt": 2}
    names = ["bear", "cat"]

    def maps(**given: Any) -> Tensor:
        return compose(pipe, **arguments, **given).attention_maps

    # A weight of 0 keeps a concept's words among the maps and its LoRA out of the model.
    silent = {name: Concept(name=name, weight=0) for name in names}
    alone = [
        maps(method="merge", concepts=["bear", silent["cat"]]), maps(method="merge", concepts=[silent["bear"], "cat"])
    ]  # fmt: skip
    expected = alone[0] if method == "switch" else (alone[0] + alone[1]) / 2
    torch.testing.assert_close(maps(method=method, concepts=names), expected, atol=1e-6, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-4


@pytest.mark.parametrize("method", slow_but(["switch"], METHODS))
def test_regions_are_ignored_with_one_warning(pipe, method, caplog):
    expected = latents_of(pipe, method=method, num_inference_steps=1, **PAIR)
    placed = [Concept(name="cat", region=(0, 0, 64, 128)), "dog"]
    for _ in range(2):
        assert torch.equal(latents_of(pipe, method=method, num_inference_steps=1, concepts=placed), expected)
    said = [record.getMessage() for record in caplog.records if "region" in record.getMessage()]
    assert said == [f"{method} ignores regions; use method='regional'"]


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, "2", None])
def test_an_interval_must_be_a_whole_number_of_steps(interval):
    with pytest.raises(ValueError, match=f"interval must be a whole number of steps, at least 1, not {interval!r}"):
        Switch(interval=interval)


@pytest.mark.parametrize("shares", [[], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")], [True, 1], "12", 1])
def test_shares_must_be_numbers_that_make_an_average(shares):
    with pytest.raises(ValueError, match="shares must be non-negative numbers, not all 0, not"):
        Composite(shares=shares)


def test_there_must_be_a_share_for_every_concept(pipe):
    with pytest.raises(ValueError, match="composite has 3 shares, but there are 2 concepts"):
        compose(pipe, method=Composite(shares=[1, 1, 1]), **PAIR)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("factor", "texts"), [(1.0, 3), (0.0, 1)])
def test_a_text_is_encoded_once_unless_loras_change_it(pipe, method: str, factor: float, texts: int) -> None:
    encoded: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    concepts = [Concept(name=name, blocks={"text": factor}) for name in TRIGGERS]
    latents_of(pipe, concepts=concepts, method=method, num_inference_steps=1)
    assert len(encoded) == 2 * texts  # prompt and negative prompt
