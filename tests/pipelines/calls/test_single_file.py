"""A checkpoint in one file, in the original layout, opens like a folder."""

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("opener", [ComposePipeline, OURS["sd"]])
@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
def test_a_unet_that_predicts_velocity_is_known_by_the_marks_in_its_file(tmp_path, marks, opener):
    composer = small_pipeline()
    composer.save_pretrained(tmp_path / "model")
    path = write_checkpoint(composer, tmp_path / "model.safetensors")
    save_file(load_file(path) | {mark: torch.zeros(0) for mark in marks}, path)
    options = {"config": str(tmp_path / "model"), "local_files_only": True}
    config = opener.from_single_file(path, **options).scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr is ("ztsnr" in marks)
    given = ComposePipeline.from_single_file(path, **options, scheduler=composer.scheduler).scheduler
    assert given.config.prediction_type == "epsilon"


def test_the_refiner_in_one_file_is_refused_before_it_is_read(tmp_path):
    key = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({key: torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="this is SDXL's refiner"):
        ComposePipeline.from_single_file(tmp_path / "refiner.safetensors")


UNET = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize("key", [UNET, UNET.removeprefix("model.diffusion_model.")])
def test_a_unet_without_text_encoders_of_sdxl_is_stable_diffusion(key):
    assert ComposePipeline.family_of_keys(["cond_stage_model.x", key]) is OURS["sd"]


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "patchify_proj.weight",
        "control_model.input_blocks.0.0.weight", "decoder.conv_in.weight",
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(key):
    with pytest.raises(ValueError, match="is not of a supported model: its first tensors are"):
        ComposePipeline.family_of_keys([key])
