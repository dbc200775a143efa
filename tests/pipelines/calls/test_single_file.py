"""A checkpoint in one file, in the original layout, opens like a folder."""

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import write_checkpoint
from components import small_pipeline, xl_pipeline
from composing import OURS, run, same_bits
from lora_compose.pipelines.families import ComposePipeline


@pytest.mark.parametrize(
    ("family", "opener"), [("sd", None), pytest.param("sdxl", ComposePipeline, marks=pytest.mark.slow)]
)
def test_a_checkpoint_in_one_file_opens_like_a_folder(load_concepts, tmp_path, family, opener):
    composer = small_pipeline() if family == "sd" else xl_pipeline()
    composer.set_progress_bar_config(disable=True)
    load_concepts(composer, "cat", "dog")
    composer.save_pretrained(tmp_path / "model")
    path = write_checkpoint(composer, tmp_path / "model.safetensors")
    opened = (opener or OURS[family]).from_single_file(path, config=str(tmp_path / "model"), local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is OURS[family]
    load_concepts(opened, "cat", "dog")
    for arguments in ({}, {"concepts": ["cat", "dog"], "method": "tara"}):
        assert same_bits(run(opened, **arguments).images, run(composer, **arguments).images)


def test_the_refiner_in_one_file_is_refused_before_it_is_read(tmp_path):
    key = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({key: torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="this is SDXL's refiner"):
        ComposePipeline.from_single_file(tmp_path / "refiner.safetensors")
