"""The diffusers back ends of SGLang and vLLM-Omni themselves: their images are those of the same calls in Python.

Each needs an environment of its own: `make engines` builds them, without what needs a GPU, and runs this file there.
"""

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import free_port
from engines import CUSTOM_PIPELINE, sglang_folder
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept
from served import answer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what the engines import warns of a lot

PROMPT = "a xlo bear and a qrt robot on grass"
CONCEPTS: list[dict[str, Any]] = [
    {"name": name, "lora": str(playground_lora(name)), "trigger": word, "class_word": name}
    for name, word in (("bear", "xlo"), ("robot", "qrt"))
]
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}
SEED = 1
SECONDS_TO_START = 600.0
SECONDS_TO_END = 60.0


def in_python(dtype: torch.dtype, weights: tuple[float, float] = (1.0, 1.0), **options: Any) -> Any:
    pipe: Any = ComposePipeline.from_pretrained(playground_model(), dtype=dtype)
    concepts = [Concept(**one, weight=weight) for one, weight in zip(CONCEPTS, weights, strict=True)]
    generator = torch.Generator().manual_seed(SEED)
    return pipe(prompt=PROMPT, concepts=concepts, width=128, height=128, generator=generator, **SAMPLING, **options)


@pytest.fixture
def sglang_server(tmp_path: Path) -> Iterator[int]:
    """The port of a server started as docs/engines.md does; the model is in bfloat16, which is SGLang's default."""
    folder = sglang_folder(playground_model(), tmp_path / "model")
    port = free_port()
    command = [Path(sys.executable).with_name("sglang"), "serve", "--model-path", folder, "--backend", "diffusers",
               "--trust-remote-code", "--warmup-resolutions", "128x128", "--port", str(port)]  # fmt: skip
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no answer in {SECONDS_TO_START:.0f} s:\n{log.read_text()}"
            time.sleep(1)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(SECONDS_TO_END)
        finally:
            server.kill()  # nothing happens if it has ended
            server.wait()


def _answers(port: int) -> bool:
    try:
        return answer(port, "/health")[0] == 200
    except OSError:
        return False


@pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang: make engines")
def test_sglang_composes_with_concepts_in_a_request_bit_for_bit(sglang_server: int) -> None:
    request = {"prompt": PROMPT, "size": "128x128", "seed": SEED, **SAMPLING, "response_format": "b64_json",
               "output_format": "png", "diffusers_kwargs": {"method": "draft", "concepts": CONCEPTS}}  # fmt: skip
    status, body, _ = answer(sglang_server, "/v1/images/generations", request)
    assert status == 200, body
    made = Image.open(io.BytesIO(base64.b64decode(json.loads(body)["data"][0]["b64_json"])))
    image = in_python(torch.bfloat16, method="draft", output_type="np").images[0]
    assert (np.asarray(made) == (image * 255).astype(np.uint8)).all()  # SGLang rounds down


@pytest.mark.skipif(find_spec("vllm_omni") is None, reason="needs vLLM-Omni: make engines")
def test_vllm_omni_composes_with_concepts_of_its_start_and_of_a_request_bit_for_bit(own_modules: None) -> None:
    from vllm.config.load import LoadConfig  # pyright: ignore[reportMissingImports]
    from vllm_omni.diffusion.data import OmniDiffusionConfig  # pyright: ignore[reportMissingImports]
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader  # pyright: ignore[reportMissingImports]
    from vllm_omni.diffusion.request import OmniDiffusionRequest  # pyright: ignore[reportMissingImports]
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch  # pyright: ignore[reportMissingImports]
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams  # pyright: ignore[reportMissingImports]

    library = {one["name"]: {field: value for field, value in one.items() if field != "name"} for one in CONCEPTS}
    load = {"custom_pipeline": str(CUSTOM_PIPELINE), "trust_remote_code": True, "concepts": library}
    config = OmniDiffusionConfig.from_kwargs(
        model=str(playground_model()), dtype="float32", diffusion_load_format="diffusers",
        diffusers_load_kwargs=json.loads(json.dumps(load)),
    )  # fmt: skip
    config.enrich_config()
    loader = DiffusersPipelineLoader(LoadConfig(), od_config=config)
    adapter: Any = loader.load_model(load_device="cpu", load_format="diffusers", device=torch.device("cpu"))

    def request(prompt: Any) -> Any:
        sampling = OmniDiffusionSamplingParams(
            width=128, height=128, seed=SEED, generator_device="cpu", output_type="pt", **SAMPLING
        )
        batch = DiffusionRequestBatch([OmniDiffusionRequest(prompt=prompt, sampling_params=sampling, request_id="1")])
        return adapter(batch).output

    tagged = request(f"{PROMPT} <lora:bear> <lora:robot:0.8>")
    assert torch.equal(tagged, in_python(torch.float32, (1.0, 0.8), output_type="pt").images)
    given = request({"prompt": PROMPT, "multi_modal_data": {"concepts": json.loads(json.dumps(CONCEPTS))}})
    assert torch.equal(given, in_python(torch.float32, output_type="pt").images)
    assert not torch.equal(tagged, given)
