"""The exported Python makes the image of the run, whatever the arguments of the family's call are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from flux import flux_pipeline
from flux3 import default_flux3
from lora_compose import Concept, Run, Scene
from lora_compose.compose.files.images import read_pixels
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.page import export
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.families import ComposeFlux3DistilledPipeline, ComposeFluxKontextPipeline
from qwen_image import qwen_image_pipeline
from transformer_families import as_file, random_lora_of_all


@pytest.mark.parametrize(
    ("pipeline", "negative_prompt"),
    [
        (partial(flux_pipeline, guidance_embeds=False), "the photo"),
        (partial(flux_pipeline, ComposeFluxKontextPipeline), ""),  # whose size is a shape and an area
        pytest.param(partial(default_flux3, ComposeFlux3DistilledPipeline, flow_map=True), "", marks=pytest.mark.slow),
        pytest.param(qwen_image_pipeline, "", marks=pytest.mark.slow),
    ],
    ids=["flux", "kontext", "flux3-distilled", "qwen-image"],
)
def test_the_exported_python_makes_the_image_on_every_family(
    pipeline: Callable[[], Any], negative_prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = pipeline()
    pipe.save_pretrained("model")
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 0))), "cat.safetensors")
    cat = Concept(name="cat", lora="cat.safetensors", trigger="sks", class_word="cat", weight=0.5)
    scene = Scene(prompt="a sks cat on grass", negative_prompt=negative_prompt, concepts=(cat,), width=128, height=64)
    run = Run(scene=scene, model="model", method="merge", steps=1, guidance_scale=2.0, seed=3, device="cpu")
    made = make(open_model(run), run).image
    exec(compile(export.python(run, [Saver.TILING, Saver.GRADIENT_CHECKPOINTING]), "it.py", "exec"), {})
    assert made.size == (128, 64)
    assert np.array_equal(np.asarray(made), np.asarray(read_pixels("result.png")))
