"""Callbacks see and change what they do in diffusers, and interrupt a call."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from safetensors.torch import save_file
from torch import Tensor

from all_transformers import TRANSFORMERS
from components import FAMILIES, State, lora_tensors
from composing import BOTH, UPDATES, compose, composer_of, latents_of, one_step, run
from flux2 import LAYERS
from lora_compose.attention import LoraFactors
from pairs import in_pairs, slow_but

EVERY_FAMILY = FAMILIES | {name: family.pipeline for name, family in TRANSFORMERS.items()}
USUAL = ("sd", "sdxl", "flux", "qwen-image")
SHAPES = {
    "sd": {"latents": (1, 4, 16, 16), "prompt_embeds": (2, 32, 24), "negative_prompt_embeds": (1, 32, 24)},
    "sdxl": {
        "latents": (1, 4, 16, 16), "prompt_embeds": (2, 32, 24), "add_text_embeds": (2, 12), "add_time_ids": (2, 6),
    },
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_callbacks_are_given_every_tensor_that_diffusers_names(composer, family, concepts):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: value.shape for name, value in tensors.items()}))
        return tensors

    names = composer._callback_tensor_inputs
    run(composer, concepts=concepts, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == [0, 1]
    assert [timestep for _, timestep, _ in seen] == composer.scheduler.timesteps.tolist()
    assert all(tensors == SHAPES[family] for _, _, tensors in seen)


@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_callbacks_may_name_only_tensors_that_there_are(composer, concepts):
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs.*noise_pred"):
        run(composer, concepts=concepts, callback_on_step_end_tensor_inputs=["noise_pred"])


@pytest.mark.parametrize(("name", "composed"), in_pairs(slow_but(USUAL, sorted(EVERY_FAMILY)), [False, True]))
def test_no_tensors_may_be_asked_for(name: str, composed: bool) -> None:
    pipe = EVERY_FAMILY[name]()
    concept = {"concepts": ["nothing"], "method": "merge"} if composed else {}
    if composed:
        layer = next(found for found in pipe.model.state_dict() if found.endswith("to_q.weight"))
        rows, columns = pipe.model.state_dict()[layer].shape
        factors = {layer.removesuffix(".weight"): LoraFactors(torch.zeros(1, columns), torch.zeros(rows, 1))}
        part = "unet" if pipe.components.get("unet") is not None else "transformer"
        with TemporaryDirectory() as folder:
            path = Path(folder) / "nothing.safetensors"
            save_file(lora_tensors(**{part: factors}), path)
            pipe.load_concept(path, "nothing")
    concept |= {} if name not in ("flux2", "flux3") else {"text_encoder_out_layers": LAYERS}
    concept |= {} if name != "ideogram4" else {"guidance_scale": 7.0, "guidance_schedule": None}
    call = {"width": 64, "height": 64, "num_inference_steps": 1, "output_type": "latent", "prompt": "a cat"}
    found = pipe(**call, **concept, callback_on_step_end_tensor_inputs=None, generator=torch.manual_seed(0)).images
    assert torch.equal(found, pipe(**call, **concept, generator=torch.manual_seed(0)).images)


def test_a_callback_without_tensors_is_given_none(composer: Any) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors)
        return tensors

    compose(composer, callback_on_step_end=look, callback_on_step_end_tensor_inputs=None)
    assert seen == [{}, {}]


def test_several_callbacks_of_diffusers_run_in_turn(composer):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    callbacks = MultiPipelineCallbacks([cutoff, SDCFGCutoffCallback(cutoff_step_ratio=1.0)])
    output = compose(composer, num_inference_steps=3, callback_on_step_end=callbacks)
    assert output.cost.rows_forward == 2 + 1 + 1
    assert torch.equal(output.images, latents_of(composer, num_inference_steps=3, callback_on_step_end=cutoff))


@pytest.mark.parametrize(("family", "name"), [
    ("sd", "prompt_embeds"), ("sd", "negative_prompt_embeds"), ("sdxl", "prompt_embeds"), ("sdxl", "add_text_embeds"),
])  # fmt: skip
def test_callbacks_may_not_change_the_text(composer, name):
    def change(pipe, step, timestep, tensors):
        return {name: tensors[name] * 0.5}

    before = State(composer)
    with pytest.raises(ValueError, match=f"changed {name}; with concepts it may change latents or switch guidance off"):
        compose(composer, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    before.assert_unchanged()


@pytest.mark.parametrize(("family", "method"), [pytest.param("sd", UPDATES, marks=pytest.mark.slow), ("sdxl", "tara")])
def test_an_interrupted_call_gives_what_there_is_and_leaves_nothing(family: str, method: Any) -> None:
    composer, kept = composer_of(family, whole=True), []
    before = State(composer)

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    found = one_step(composer, method=method, num_inference_steps=3, callback_on_step_end=stop)
    before.assert_unchanged()
    assert len(kept) == 2
    assert torch.equal(found.images, kept[1])
    again = one_step(composer, method=method, num_inference_steps=3)
    assert (found.cost.rows_forward, again.cost.rows_forward) == (4, 6)
