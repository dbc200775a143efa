"""From a folder to the rows of a training: words, features and images belong together, and mean what they mean later.

References are made by hand: the text encoders and the VAE are called directly, and `tara` of the pipeline is compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lora_compose import ComposePipeline
from lora_compose.compose.training import TaraTraining, train
from lora_compose.compose.training.bases import base_of
from lora_compose.compose.training.examples import Examples
from lora_compose.compose.training.model import ADAPTER, lora_parameters
from lora_compose.compose.training.preparation import TrainingData, adapt, encode, read_captioned
from lora_compose.compose.training.words import WordFeatures
from pairs import slow_but
from trainings import SIDE, TARA, paint_folder, sd_pipeline, training, xl_pipeline

CAPTIONS = ("a sks cat on grass", "a red sks cat in snow")  # the trigger stands at different tokens
SHOWN = (0, 1, 0)  # which of them images have
WIDE = (40, 32)
MODELS = {"sd": sd_pipeline, "xl": xl_pipeline}


@pytest.fixture(params=list(MODELS))
def pipe(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three wide images, one of them larger, with captions."""
    paint_folder(tmp_path / "images", 3, WIDE)
    larger = Image.open(tmp_path / "images" / "1.png").resize((80, 64))
    larger.save(tmp_path / "images" / "1.png")
    for i, caption in enumerate(SHOWN):
        (tmp_path / "images" / f"{i}.txt").write_text(CAPTIONS[caption])
    return tmp_path


def encoded(pipe: Any, folder: Path, tara: TaraTraining | None = TARA) -> tuple[TrainingData, Examples]:
    settings = training(folder, "unused", tara=tara)
    data = encode(base_of(pipe), read_captioned(base_of(pipe), settings), settings, Accelerator(cpu=True))
    return data, data.concept


def rows_of(data: TrainingData) -> WordFeatures:
    assert data.rows is not None
    return data.rows


def tokens_of(pipe: Any, caption: str) -> list[str]:
    ids = pipe.tokenizer(caption, padding="max_length").input_ids
    return [token.removesuffix("</w>") for token in pipe.tokenizer.convert_ids_to_tokens(ids)]


@torch.no_grad()
def text_of(pipe: Any, caption: str) -> tuple[Tensor, Tensor | None]:
    """Features of a caption, and SDXL's pooled ones, from the text encoders themselves."""
    if not hasattr(pipe, "text_encoder_2"):
        ids = pipe.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
        return pipe.text_encoder(ids)[0][0], None
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
        found = encoder(ids, output_hidden_states=True)
        hidden.append(found.hidden_states[-2][0])
        pooled = found[0][0]
    return torch.cat(hidden, dim=-1), pooled


def test_every_image_has_its_own_caption_with_the_mask_at_the_trigger(pipe: Any, folder: Path) -> None:
    _, examples = encoded(pipe, folder)
    for image, shown in enumerate(SHOWN):
        row, caption = examples.caption[image], CAPTIONS[shown]
        features, pooled = text_of(pipe, caption)
        torch.testing.assert_close(examples.text[row], features)
        marked = [token for token, mask in zip(tokens_of(pipe, caption), examples.mask[row, :, 0], strict=True) if mask]
        assert marked == ["sks"]
        assert examples.mask.unique().tolist() == [0, 1]
        if pooled is not None:
            torch.testing.assert_close(examples.by_caption["text_embeds"][row], pooled)
    assert set(examples.by_caption) == ({"text_embeds"} if hasattr(pipe, "text_encoder_2") else set())


def test_latents_are_those_of_the_middle_square_at_the_scale_of_the_model(pipe: Any, folder: Path) -> None:
    _, examples = encoded(pipe, folder)
    for image, latents in enumerate(examples.latents):
        image = Image.open(folder / "images" / f"{image}.png").resize((40, 32), Image.Resampling.LANCZOS)
        pixels = np.asarray(image.crop((4, 0, 36, 32)), dtype="f4") / 127.5 - 1
        with torch.no_grad():
            mean = pipe.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist.mean[0]
        torch.testing.assert_close(latents, mean * pipe.vae.config.scaling_factor)
    assert not torch.allclose(examples.latents[0], examples.latents[1], atol=1e-2)


def test_sdxl_gets_the_size_and_the_crop(folder: Path) -> None:
    _, examples = encoded(xl_pipeline(), folder)
    small, large = [32, 40, 0, 4, SIDE, SIDE], [64, 80, 0, 4, SIDE, SIDE]
    assert examples.by_image["time_ids"].tolist() == [small, large, small]
    _, examples = encoded(sd_pipeline(), folder)
    assert not examples.by_image


@pytest.mark.parametrize("target", ["caption", "clean"])
def test_the_trigger_is_aligned_with_the_class_word_of_its_own_caption(pipe: Any, folder: Path, target: Any) -> None:
    rows = rows_of(encoded(pipe, folder, TaraTraining(class_target=target))[0])
    for row, caption in enumerate(CAPTIONS):
        features, tokens = text_of(pipe, caption)[0], tokens_of(pipe, caption)
        torch.testing.assert_close(rows.trigger[row], features[tokens.index("sks")])
        if target == "clean":
            caption = caption.replace("sks ", "")
            features, tokens = text_of(pipe, caption)[0], tokens_of(pipe, caption)
        torch.testing.assert_close(rows.noun[row], features[tokens.index("cat")])


def test_class_images_have_no_mask(pipe: Any, folder: Path) -> None:
    paint_folder(folder / "class", 2)
    settings = training(folder, "unused", tara=TARA, class_images=folder / "class")
    data = encode(base_of(pipe), read_captioned(base_of(pipe), settings), settings, Accelerator(cpu=True))
    assert data.prior is not None
    assert len(data.prior) == 2
    assert not data.prior.mask.any()
    torch.testing.assert_close(data.prior.text[0], text_of(pipe, "a photo of cat")[0])


@pytest.mark.parametrize("kind", slow_but(["sd"], MODELS))
def test_training_sees_the_lora_as_tara_shows_it_later(kind: str, folder: Path) -> None:
    """A step of `tara` from the file alone is the step of the training's UNet, mask and alpha included."""
    make: Callable[[], Any] = MODELS[kind]
    make().save_pretrained(folder / "model")
    settings = training(folder, folder / "model", tara=TARA, alpha=5, steps=3)
    written = load_file(train(settings))
    prompt = CAPTIONS[1]

    trained = make()
    focus = adapt(base_of(trained), settings, None).focus
    assert focus is not None
    with torch.no_grad():
        for name, parameter in lora_parameters(trained.unet).items():
            parameter.copy_(written[f"unet.{name.replace(f'.{ADAPTER}.', '.')}"])
    features, pooled = text_of(trained, prompt)
    trigger = tokens_of(trained, prompt).index("sks")
    focus.mask = torch.zeros(1, len(features), 1)
    focus.mask[0, trigger] = 1
    scheduler: Any = DDIMScheduler.from_config(trained.scheduler.config)
    scheduler.set_timesteps(1)
    latents = torch.randn(1, trained.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    side = 16 * trained.vae_scale_factor
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    added = None if pooled is None else {"text_embeds": pooled[None], "time_ids": sizes}
    with torch.no_grad():
        predicted = trained.unet(latents, scheduler.timesteps[0], features[None], added_cond_kwargs=added).sample
    expected = scheduler.step(predicted, int(scheduler.timesteps[0]), latents).prev_sample

    pipe: Any = ComposePipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_concept(settings.out)

    def step(**given: Any) -> Tensor:
        options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return pipe(prompt, width=side, height=side, latents=latents, **options, **given).images

    torch.testing.assert_close(step(concepts=["cat"], method="tara"), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(step(concepts=["cat"], method="merge"), expected, atol=1e-3)
    assert not torch.allclose(step(), expected, atol=1e-3)
