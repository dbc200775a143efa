"""Training LoRAs of transformers: flow matching by hand, files that diffusers opens, and what is refused."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from anima import anima_pipeline
from commands import call
from components import seeded
from flux import flux_pipeline
from flux3 import default_flux3, flux3_pipeline
from lora_compose import ComposePipeline
from lora_compose.attention.backbones.joint import unpacked
from lora_compose.compose.training import TaraTraining, train
from lora_compose.compose.training.bases import base_of
from lora_compose.compose.training.batches import batches_of
from lora_compose.compose.training.learner import Learner, Weights
from lora_compose.compose.training.loop import Stopped
from lora_compose.compose.training.model import cast, lora_parameters, preset_of
from lora_compose.compose.training.noising import Flow
from lora_compose.compose.training.preparation import adapt, encode, read_captioned
from lora_compose.pipelines.families.flux3 import ComposeFlux3DistilledPipeline
from pairs import slow_but
from trainings import TRAINED, paint_folder, sd_pipeline, trained_pipeline, training

SIDE = 32  # pixels: two by two tokens
FRAMES = "Anima", "Krea 2", "Qwen-Image"
"""Families with a VAE for videos."""


SLOW = "Anima", "Chroma", "FLUX.1 Kontext", "FLUX.3", "Ideogram 4"
"""Families that the default suite does not train: nothing in training is theirs alone, or there are tests about it."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRAINED])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint_folder(tmp_path / "images", 2, (SIDE, SIDE))
    for i, caption in enumerate(("a sks cat on grass", "a sks cat and a dog")):
        (tmp_path / "images" / f"{i}.txt").write_text(caption)
    return tmp_path


def opened(family: str) -> Any:
    return trained_pipeline(TRAINED[family])


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    return torch.as_tensor(pipe._decode(latents, "pt"))


def test_latents_are_what_the_pipeline_decodes(family: str) -> None:
    """Read back by the pipeline, latents of an image are those that the VAE alone would decode."""
    pipe = opened(family)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=seeded(0)) * 2 - 1
    with torch.no_grad():
        latents = base_of(pipe).latents(pixels)
        frame = (slice(None), slice(None), None) if family in FRAMES else ()
        alone = pipe.vae.decode(pipe.vae.encode(pixels[frame] if frame else pixels).latent_dist.mode()).sample
        alone = alone[:, :, 0] if frame else alone
        torch.testing.assert_close(decoded(pipe, latents), (alone / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_flow_matching(family: str, folder: Path) -> None:
    """Noise on a line, its direction as the target, all rows alike."""
    base = base_of(opened(family))
    settings = training(folder, "unused", resolution=SIDE, prior_weight=0.0)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, None, None, seed=0, sizes=(2, 0), noising=base.noising(settings))
    batch = batches.of(0, 0)
    assert ((batch.times > 0) & (batch.times < 1000)).all()
    adapt(base, settings, None)
    with torch.no_grad():
        losses = Learner(base.network, base.noising(settings), Weights())(batch)
        share = batch.times.view(-1, 1, 1, 1) / 1000
        noisy = (1 - share) * batch.latents + share * batch.noise
        velocity = base.noising(settings).predict(noisy, batch.times, batch.text, batch.added)
    torch.testing.assert_close(losses.total, F.mse_loss(velocity, batch.noise - batch.latents))
    assert losses.prior == 0


@pytest.mark.parametrize("family", slow_but(("FLUX.1", "Krea 2", "Qwen-Image", "Z-Image"), TRAINED), indirect=True)
def test_every_layer_that_gets_a_lora_learns(family: str, folder: Path) -> None:
    """Several processes wait for the gradient of each parameter."""
    base = base_of(opened(family))
    settings = training(folder, "unused", resolution=SIDE, prior_weight=0.0, scope="transformer")
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, None, None, seed=0, sizes=(2, 0), noising=base.noising(settings))
    adapt(base, settings, None)
    parameters = {name: it for name, it in lora_parameters(base.network).items() if it.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    Learner(base.network, base.noising(settings), Weights())(batches.of(0, 0)).total.backward()
    assert [name for name, it in parameters.items() if it.grad is None or not it.grad.any()] == []


@pytest.mark.parametrize("family", ["Anima", "FLUX.3"], indirect=True)
def test_the_loss_is_that_of_what_the_modular_pipeline_gets_of_its_transformer(family: str, folder: Path) -> None:
    """In the second of three steps of diffusers' own call, with a LoRA that changes something."""
    base = base_of(opened(family))
    settings = training(folder, "unused", prior_weight=0.0)
    captioned = read_captioned(base, settings)
    material = encode(base, captioned, settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, None, None, seed=0, sizes=(1, 0), noising=base.noising(settings))
    batch, caption = batches.of(0, 0), captioned.images[batches.concept.image(0)].caption
    adapt(base, settings, None)
    plain, calls = TRAINED[family].plain(**base.pipe.components), []
    base.network.register_forward_hook(
        lambda module, given, named, output: calls.append((named, output[0])), with_kwargs=True
    )
    with torch.no_grad():
        for parameter in lora_parameters(base.network).values():
            parameter.add_(0.1)
        plain(
            prompt=caption, height=SIDE, width=SIDE, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
            generator=seeded(1),
        )  # fmt: skip
    given, velocity = calls[1]
    noisy = given["hidden_states"]
    if family == "Anima":  # videos of one frame
        noisy, velocity = noisy[:, :, 0], velocity[:, :, 0]
    else:  # patches as tokens
        noisy, velocity = (unpacked(tokens, (SIDE // 8, SIDE // 8)) for tokens in (noisy, velocity))
    share = given["timestep"]
    noise = (noisy - (1 - share) * batch.latents) / share
    batch = batch._replace(noise=noise, input_noise=noise, times=share * 1000)
    with torch.no_grad():
        losses = Learner(base.network, base.noising(settings), Weights())(batch)
    torch.testing.assert_close(losses.total, F.mse_loss(velocity, noise - batch.latents))


def test_texts_of_flux3_are_read_as_long_as_they_are(folder: Path) -> None:
    """In one batch, beside a longer caption and one of the class, each row is predicted as it is alone."""
    long = " and ".join(["a sks cat on grass"] * 20)
    (folder / "images" / "0.txt").write_text(long)
    base = base_of(default_flux3())
    settings = training(folder, "unused", preserve_class=True)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, material.prior, None, seed=0, sizes=(2, 1), noising=base.noising(settings))
    batch = batches.of(0, 0)
    assert sorted(batch.added["read"][:2].tolist()) == [80, 240]
    with torch.no_grad():
        found = base.noising(settings).predict(batch.latents, batch.times, batch.text, batch.added)
        for row, image in enumerate(map(batches.concept.image, (0, 1))):
            text, _ = base.texts([long if image == 0 else "a sks cat and a dog"])
            alone = base.noising(settings).predict(batch.latents[row, None], batch.times[row, None], text, {})
            torch.testing.assert_close(found[row, None], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["FLUX.1", "Qwen-Image"], indirect=True)
def test_the_class_is_kept_as_the_base_model_predicts_it(family: str, folder: Path) -> None:
    """Exactly at the start, where the LoRA changes nothing; afterwards by the distance to the base model."""
    base = base_of(opened(family))
    settings = training(folder, "unused", resolution=SIDE, preserve_class=True)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, material.prior, None, seed=0, sizes=(1, 2), noising=base.noising(settings))
    batch = batches.of(0, 0)
    rows = slice(1, None)
    noisy = base.noising(settings).noisy(batch.latents, batch.noise, batch.times)[rows]
    added = {name: value[rows] for name, value in batch.added.items()}
    with torch.no_grad():
        expected = base.noising(settings).predict(noisy, batch.times[rows], batch.text[rows], added)
        adapt(base, settings, None)
        learner = Learner(base.network, base.noising(settings), Weights(), preserves=True)
        assert learner(batch).prior == 0
        for parameter in lora_parameters(base.network).values():
            parameter.add_(0.2)
        found = base.noising(settings).predict(noisy, batch.times[rows], batch.text[rows], added)
        distance = F.mse_loss(found, expected)
        assert distance > 1e-4
        torch.testing.assert_close(learner(batch).prior, distance, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("family", "empty"), [("FLUX.1", 0), ("FLUX.2", 1), ("Qwen-Image", 1)], indirect=["family"])
def test_unconditional_rows_are_kept_where_guidance_has_them(family: str, empty: int, folder: Path) -> None:
    base = base_of(opened(family))
    settings = training(folder, "unused", resolution=SIDE, preserve_class=True)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    assert material.prior is not None
    assert len(material.prior) == len(material.concept) * (1 + empty)


@pytest.mark.parametrize("family", ["FLUX.1"], indirect=True)
def test_no_empty_caption_is_kept_where_guidance_has_none(family: str, folder: Path) -> None:
    opened(family).save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="this model has none; use preserve_class"):
        train(training(folder, folder / "model", resolution=SIDE, preserve_empty=True))


@pytest.mark.parametrize("family", slow_but(["FLUX.1"], TRAINED), indirect=True)
def test_a_file_opens_in_diffusers_and_composes(family: str, folder: Path) -> None:
    pipe = opened(family)
    pipe.save_pretrained(folder / "model")
    assert preset_of(str(folder / "model")) == "transformer"
    settings = training(
        folder, folder / "model", resolution=SIDE, steps=1, scope="transformer", alpha=5, class_count=1, class_steps=1
    )
    path = train(settings)
    assert len(list((folder / "cat-class").glob("*.png"))) == 1
    tensors = load_file(path)
    layers = {name.split(".lora_")[0] for name in tensors}
    assert not any("norm" in name or "modulation" in name.lower() or "_mod." in name for name in layers)
    assert {name.split(".")[0] for name in layers} == {"transformer"}
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == f"{pipe.architecture}/lora"
    assert json.loads(told["training"])["scope"] == "transformer"
    pipe.load_concept(path)
    assert pipe.resolve_concepts(["cat"])[0].concept.phrase == "sks cat"
    pipe.load_lora_weights(path, adapter_name="cat")
    assert pipe.transformer.peft_config["cat"].lora_alpha == 5


@pytest.mark.parametrize(
    ("pipeline", "scope", "ends"),
    [
        (partial(anima_pipeline, concat_padding_mask=True), "cross_kv", ("attn2.to_k", "attn2.to_v")),
        pytest.param(default_flux3, "attention", ("to_q", "to_k", "to_v", "to_out.0"), marks=pytest.mark.slow),
    ],
    ids=["Anima", "FLUX.3"],
)
def test_the_command_trains_on_a_modular_pipeline(
    pipeline: Callable[[], Any], scope: str, ends: tuple[str, ...], folder: Path
) -> None:
    """In bf16 with gradient checkpointing, as the preset has it; the file changes the image as diffusers loads it."""
    pipeline().save_pretrained(folder / "model")
    path = folder / "cat.safetensors"
    call(
        "train", folder / "images", "--out", path, "--trigger", "sks", "--class", "cat", "--model", folder / "model",
        "--scope", scope, "--steps", 2, "--lr", 0.05, "--resolution", SIDE, "--cpu",
    )  # fmt: skip
    assert {name.split(".lora_")[0].endswith(ends) for name in load_file(path)} == {True}
    made = {"prompt": "a sks cat", "width": SIDE, "height": SIDE, "num_inference_steps": 2, "output_type": "latent"}
    pipe: Any = ComposePipeline.from_pretrained(folder / "model")
    before = pipe(**made, generator=seeded(0)).images
    pipe.load_concept(path)
    ours = pipe(**made, generator=seeded(0), concepts=["cat"], method="merge").images
    pipe.load_lora_weights(path)
    theirs = pipe(**made, generator=seeded(0)).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - before).abs().max() > 1e-2


def test_a_training_on_a_modular_pipeline_resumes_with_the_same_bits(folder: Path) -> None:
    anima_pipeline().save_pretrained(folder / "model")
    settings = training(folder, folder / "model", steps=2)
    whole = load_file(train(training(folder, folder / "model", steps=2, out=folder / "whole.safetensors")))
    with pytest.raises(Stopped, match="stopped after step 1 of 2"):
        train(settings, on_step=lambda step, loss: signal.raise_signal(signal.SIGINT))
    resumed = load_file(train(settings))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_layers_that_diffusers_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    """A network that was cast has the precisions of one that was opened so."""
    network = flux3_pipeline().transformer
    network.save_pretrained(tmp_path)
    cast(network, torch.bfloat16)
    opened_so = type(network).from_pretrained(tmp_path, dtype=torch.bfloat16)
    found, expected = ({name: p.dtype for name, p in one.named_parameters()} for one in (network, opened_so))
    assert found == expected
    assert set(found.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_prediction_is_that_of_the_network_with_the_guidance_of_the_training(guidance: float, folder: Path) -> None:
    """Also where the class is kept: the base model's prediction has the same guidance."""
    pipe = flux_pipeline()
    base, seen = base_of(pipe), []
    settings = training(folder, "unused", resolution=SIDE, preserve_class=True, guidance=guidance)
    base.check(settings)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    noising = base.noising(settings)
    batch = batches_of(material.concept, material.prior, None, seed=0, sizes=(2, 1), noising=noising).of(0, 0)
    adapt(base, settings, None)
    handle = pipe.transformer.register_forward_hook(
        lambda module, given, named, output: seen.append(named["guidance"]), with_kwargs=True
    )
    with torch.no_grad():
        Learner(base.network, noising, Weights(), preserves=True)(batch)
    handle.remove()
    assert {float(scale) for scales in seen for scale in scales} == {guidance}
    assert sum(map(len, seen)) == 4, "two rows of the concept, and one of the class with the LoRA and without"


def test_guidance_is_refused_where_it_is_no_input(folder: Path) -> None:
    for base in (base_of(sd_pipeline()), base_of(flux_pipeline(guidance_embeds=False)), base_of(anima_pipeline())):
        with pytest.raises(ValueError, match=r"guidance is no input of .*; leave --guidance out"):
            base.check(training(folder, "unused", guidance=3.5))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_times_is_of_the_noisiest(share: float) -> None:
    noising, random = Flow(flux_pipeline(), share), torch.Generator().manual_seed(0)
    drawn = torch.tensor([noising.draw(random) for _ in range(2000)])
    usual = torch.randn(2000, generator=random).sigmoid() >= 0.65
    assert (drawn >= 650).float().mean() == pytest.approx(share + float(usual.float().mean()) * (1 - share), abs=0.03)
    assert 0 < drawn.min() <= drawn.max() < 1000


def test_what_means_nothing_to_transformers_is_refused(folder: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "cross-attention": {"tara": TaraTraining()}, "scope cross_kv": {"scope": "cross_kv"},
        "no convolutions in its blocks": {"scope": "convolutions"},
        "--min-snr is": {"min_snr": 5.0}, "multiple of 16": {"resolution": 40},
    }  # fmt: skip
    for complaint, fields in cases.items():
        with pytest.raises(ValueError, match=complaint):
            base_of(flux_pipeline()).check(training(folder, "unused", **{"resolution": SIDE, **fields}))
    with pytest.raises(ValueError, match="the method tara takes ordinary LoRAs of Anima"):
        base_of(anima_pipeline()).check(training(folder, "unused", tara=TaraTraining()))
    with pytest.raises(ValueError, match="does not name the blocks of Anima, which --compile needs"):
        base_of(anima_pipeline()).check(training(folder, "unused", compile=True))
    with pytest.raises(ValueError, match=r"FLUX\.3 distilled reads to which time a step leads, .* train on FLUX\.3,"):
        base_of(flux3_pipeline(ComposeFlux3DistilledPipeline, flow_map=True)).check(training(folder, "unused"))
