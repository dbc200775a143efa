"""What a call costs: rows of the denoiser, and the time before the first step."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from components import tiny_pipeline
from composing import MORE_TRIGGERS, compose, with_concepts
from lora_compose.pipelines.denoising.process import FixedPasses
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import Merge
from lora_compose.pipelines.scene.canvas import Step


@pytest.mark.parametrize(("method", "concepts"), [("merge", 8), ("tara", 1)])
def test_a_call_runs_the_rows_of_diffusers_whatever_the_number_of_concepts(
    pipe, plain_pipe, load_concepts, method, concepts
):
    names = list(MORE_TRIGGERS)[:concepts]
    load_concepts(pipe, *names, rank=1)
    prompt = " ".join(MORE_TRIGGERS[name] for name in names)
    arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "latent"}
    counts = []
    for each, more in ((plain_pipe, {}), (pipe, {"concepts": names, "method": method})):
        rows: list[int] = []
        each.unet.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(len(inputs[0])))
        output = each([prompt, prompt], **arguments, **more)
        counts.append(rows)
    assert counts[0] == counts[1] == [8, 8]
    assert output.cost.rows_forward == 16
    assert output.cost.rows_backward == 0


@dataclass(frozen=True)
class _Slow(Merge):
    """Merge that takes its time, before the loop and in it."""

    def start(self, session: Session) -> FixedPasses:
        time.sleep(0.1)
        return _SlowPasses(**vars(super().start(session)))


class _SlowPasses(FixedPasses):
    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        time.sleep(0.2)
        return super().prepare(latents, first)

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        time.sleep(0.4)
        return super().step(latents, step)


class _SlowToCheck(ComposeStableDiffusionPipeline):
    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.4)
        super().check_inputs(*args, **kwargs)


def test_preparation_lasts_from_the_call_to_the_first_step():
    pipe = with_concepts(tiny_pipeline(_SlowToCheck))
    start = time.perf_counter()
    cost = compose(pipe, concepts=["cat"], method=_Slow()).cost
    assert 0.7 <= cost.preparation_seconds <= time.perf_counter() - start - 0.8
