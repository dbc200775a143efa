"""Steps, guidance, size and precision that a run does not name: by family, the model's configuration, and device."""

import importlib
import inspect
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from diffusers.modular_pipelines.flux3 import Flux3AutoBlocks, Flux3DistilledAutoBlocks
from safetensors.torch import save_file

from commands import call, flat
from flux2 import flux2_transformer, saved_klein
from lora_compose.compose.batch import worker
from lora_compose.compose.batch.entries import read_entries
from lora_compose.compose.batch.runner import run_batch, with_defaults
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.benchmark.architectures import SD2, SD15, SDXL, VAE
from lora_compose.compose.files.images import read_record, record_in
from lora_compose.compose.generate import images
from lora_compose.compose.generate.defaults import (
    OF_SHIPPED,
    call_defaults,
    complete,
    defaults_for,
    variant_in,
    words,
)
from lora_compose.compose.generate.demo import GUIDANCE, STEPS
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines import families
from lora_compose.pipelines.scene.scene import Run, Scene
from served import answer, server
from small_world import SCHEDULER, SIZE
from transformer_families import as_file, random_lora_of_all

ROOT = Path(__file__).resolve().parents[3]
SD, XL = families.ComposeStableDiffusionPipeline, families.ComposeStableDiffusionXLPipeline
FLUX, KLEIN = families.ComposeFluxPipeline, families.ComposeFlux2KleinPipeline
KREA, Z_IMAGE = families.ComposeKrea2Pipeline, families.ComposeZImagePipeline
PNDM = {"_class_name": "PNDMScheduler"}
TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
OF_XL = {"unet": SDXL, "vae": {**VAE, "force_upcast": True}}
SIDE, NO_SIDE = {"sample_size": 1024}, {"z_dim": 16}
"""The configuration of a VAE as far as the size of images depends on it; that of Qwen-Image's says nothing."""

Numbers = tuple[float, float]


def facts(
    family: Any, index: Mapping[str, Any] | None = None, name: str = "", **parts: Mapping[str, Any]
) -> ModelFacts:
    return ModelFacts(family, index or {}, parts, name=name)


def of_call(name: str, scale: str = "guidance_scale") -> Numbers:
    """Steps and guidance of a pipeline of diffusers that are given none."""
    given = inspect.signature(getattr(diffusers, name).__call__).parameters
    found = given[scale].default
    return given["num_inference_steps"].default, found[0] if isinstance(found, tuple) else found


def of_blocks(blocks: Any) -> Numbers:
    """Steps and guidance of a modular pipeline that is given none; one without a guider has none."""
    (steps,) = (one.default for one in blocks.inputs if one.name == "num_inference_steps")
    guiders = [one for one in blocks.expected_components if one.name == "guider"]
    return steps, guiders[0].config["guidance_scale"] if guiders else 1.0


def of_examples(module: str) -> list[Numbers]:
    """Steps and guidance in the example of a pipeline."""
    text = importlib.import_module(f"diffusers.pipelines.{module}").EXAMPLE_DOC_STRING
    pairs = re.findall(r"num_inference_steps=(\d+),[\s.]*guidance_scale=([\d.]+)", text)
    return [(int(steps), float(scale)) for steps, scale in pairs]


CALL, EXAMPLE, BLOCKS = "`__call__` of diffusers", "example of diffusers", "blocks of diffusers"


@dataclass(frozen=True)
class Row:
    """A model of the table, and what it gets.

    Attributes:
        told: What tells it from others of its family; empty if nothing has to.
        source: Where steps and guidance come from.
        stated: What stands there, as far as this environment has it.
    """

    facts: ModelFacts
    steps: int
    guidance: float
    side: int
    source: str
    stated: list[Numbers]
    told: str = ""


def row(
    facts: ModelFacts, steps: int, guidance: float, side: int, source: str, *stated: Numbers, told: str = ""
) -> Row:
    return Row(facts, steps, guidance, side, source, list(stated), told)


ROWS = {
    "Stable Diffusion 1.x": row(
        facts(SD, scheduler=PNDM, unet=SD15, vae=VAE), 50, 7.5, 512, CALL, of_call("StableDiffusionPipeline")
    ),
    "Stable Diffusion 2.x": row(
        facts(SD, scheduler=PNDM, unet=SD2, vae=VAE), 50, 7.5, 768, CALL, of_call("StableDiffusionPipeline")
    ),
    "Stable Diffusion XL": row(
        facts(XL, scheduler={**TRAILING, "timestep_spacing": "leading"}, **OF_XL),
        50, 5.0, 1024, CALL, of_call("StableDiffusionXLPipeline"),
    ),
    "SDXL-Turbo": row(
        facts(XL, scheduler=TRAILING, unet={**SDXL, "sample_size": 64}, vae=OF_XL["vae"]),
        4, 0.0, 512, "documentation of diffusers, SDXL Turbo",
        told="an Euler scheduler with `trailing` steps",
    ),
    "latent consistency models": row(
        facts(SD, scheduler=PNDM, unet={**SD15, "time_cond_proj_dim": 256}, vae=VAE),
        4, 8.5, 512, CALL, of_call("LatentConsistencyModelPipeline"), told="`time_cond_proj_dim` of the UNet",
    ),
    "LCM and TCD without it": row(
        facts(SD, scheduler={"_class_name": "LCMScheduler"}, unet=SD15, vae=VAE),
        4, 1.0, 512, "documentation of diffusers, LCM", told="`LCMScheduler` or `TCDScheduler`",
    ),
    "FLUX.1-dev": row(
        facts(FLUX, transformer={"guidance_embeds": True}, vae=SIDE), 28, 3.5, 1024, CALL, of_call("FluxPipeline")
    ),
    "FLUX.1-schnell": row(
        facts(FLUX, transformer={"guidance_embeds": False}, vae=SIDE),
        4, 0.0, 1024, EXAMPLE, *of_examples("flux.pipeline_flux"), told="`guidance_embeds` of the transformer is false",
    ),
    "FLUX.1 Kontext": row(
        facts(families.ComposeFluxKontextPipeline, transformer={"guidance_embeds": True}, vae=SIDE),
        28, 3.5, 1024, CALL, of_call("FluxKontextPipeline"),
    ),
    "FLUX.2-klein-base": row(
        facts(KLEIN, {"is_distilled": False}, vae=SIDE), 50, 4.0, 1024, CALL, of_call("Flux2KleinPipeline")
    ),
    "FLUX.2-klein": row(
        facts(KLEIN, {"is_distilled": True}, vae=SIDE), 4, 1.0, 1024, "`Flux2KleinKVPipeline` of diffusers",
        (inspect.signature(diffusers.Flux2KleinKVPipeline.__call__).parameters["num_inference_steps"].default, 1.0),
        told="`is_distilled` in `model_index.json`",
    ),
    "FLUX.2-dev": row(facts(families.ComposeFlux2Pipeline, vae=SIDE), 50, 4.0, 1024, CALL, of_call("Flux2Pipeline")),
    "FLUX.3": row(
        facts(families.ComposeFlux3Pipeline, vae=SIDE), 50, 3.5, 1024, BLOCKS, of_blocks(Flux3AutoBlocks())
    ),
    "FLUX.3 distilled": row(
        facts(families.ComposeFlux3DistilledPipeline, vae=SIDE),
        16, 1.0, 1024, BLOCKS, of_blocks(Flux3DistilledAutoBlocks()), told="its class",
    ),
    "Chroma": row(facts(families.ComposeChromaPipeline, vae=SIDE), 35, 5.0, 1024, CALL, of_call("ChromaPipeline")),
    "Ideogram 4": row(
        facts(families.ComposeIdeogram4Pipeline, vae=SIDE),
        48, 7.0, 2048, CALL, of_call("Ideogram4Pipeline", "guidance_schedule"),
    ),
    "Krea 2": row(facts(KREA, vae=NO_SIDE), 28, 4.5, 1024, CALL, of_call("Krea2Pipeline")),
    "Krea 2 Turbo": row(
        facts(KREA, {"is_distilled": True}, vae=NO_SIDE),
        8, 0.0, 1024, EXAMPLE, *of_examples("krea2.pipeline_krea2"), told="`is_distilled` in `model_index.json`",
    ),
    "Qwen-Image": row(
        facts(families.ComposeQwenImagePipeline, vae=NO_SIDE),
        50, 4.0, 1024, CALL, of_call("QwenImagePipeline", "true_cfg_scale"),
    ),
    "Qwen-Image-Edit-Plus": row(
        facts(families.ComposeQwenImageEditPlusPipeline, vae=NO_SIDE),
        50, 4.0, 1024, CALL, of_call("QwenImageEditPlusPipeline", "true_cfg_scale"),
    ),
    "Z-Image": row(facts(Z_IMAGE, name="Z-Image", vae=SIDE), 50, 5.0, 1024, CALL, of_call("ZImagePipeline")),
    "Z-Image-Turbo": row(
        facts(Z_IMAGE, name="Z-Image-Turbo", vae=SIDE),
        8, 0.0, 1024, EXAMPLE, *of_examples("z_image.pipeline_z_image"), told="Turbo in its name",
    ),
    "Anima": row(
        facts(families.ComposeAnimaPipeline, vae=NO_SIDE), 50, 4.0, 1024, BLOCKS, of_blocks(AnimaAutoBlocks())
    ),
    "`playground`": row(facts_of("playground"), 25, 5.0, SIZE, "its images were looked at with these"),
    "`playground-flux`": row(facts_of("playground-flux"), 25, 5.0, SIZE, "its images were looked at with these"),
}  # fmt: skip


def test_every_family_has_a_row() -> None:
    assert {one.facts.family for one in ROWS.values()} == set(families.ComposePipeline.families)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "cuda:1", "xpu"])
@pytest.mark.parametrize("name", ROWS)
def test_steps_and_guidance_are_the_models_on_every_device_and_precision_is_the_devices(name: str, device: str) -> None:
    expected = ROWS[name]
    chosen = defaults_for(device, expected.facts)
    assert (chosen.steps, chosen.guidance_scale) == (expected.steps, expected.guidance)
    half = "float16" if expected.facts.has_unet else "bfloat16"
    assert chosen.dtype == (half if device[:4] in ("cuda", "xpu") else "float32")
    assert f"run in {chosen.dtype} on {device}" in words(chosen)
    assert expected.facts.own_size == (expected.side, expected.side)


@pytest.mark.parametrize("name", [name for name, one in ROWS.items() if one.stated])
def test_the_numbers_are_those_of_their_source(name: str) -> None:
    assert (ROWS[name].steps, ROWS[name].guidance) in ROWS[name].stated


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ROWS["Stable Diffusion 1.x"].facts, "those of Stable Diffusion 1.x"),
        (ROWS["SDXL-Turbo"].facts, "distilled to few steps (its scheduler"),
        (ROWS["latent consistency models"].facts, "latent consistency model (time_cond_proj_dim"),
        (facts(XL, scheduler={"_class_name": "TCDScheduler"}), "for few steps (TCDScheduler)"),
        (ROWS["FLUX.1-schnell"].facts, "guidance_embeds is false"),
        (ROWS["FLUX.2-klein"].facts, "is_distilled in model_index.json"),
        (ROWS["Z-Image-Turbo"].facts, "Turbo in its name"),
        (facts(Z_IMAGE, {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, name="mine"), "Turbo in its name"),
        (facts(Z_IMAGE, name="Z-Image-De-Turbo"), "those of Z-Image"),
        (facts(Z_IMAGE, name="z-image-deturbo"), "those of Z-Image"),
        (facts(XL, scheduler={**TRAILING, "rescale_betas_zero_snr": True}), "those of Stable Diffusion XL"),
        (ROWS["`playground-flux`"].facts, "those of the small models"),
    ],
)  # fmt: skip
def test_what_was_chosen_says_why(model: ModelFacts, reason: str) -> None:
    assert reason in words(defaults_for("cpu", model))


def test_a_vae_in_float32_is_named_where_the_rest_is_not() -> None:
    model = ROWS["Stable Diffusion XL"].facts
    assert "its VAE decodes in float32" in words(defaults_for("cuda", model))
    assert "its VAE" not in words(defaults_for("cpu", model))


def test_given_values_stay_and_only_missing_ones_are_filled_in() -> None:
    run = Run(scene=Scene(prompt="a"), model="playground", device="cpu", steps=7)
    assert complete(run)[0].model_copy(update={"steps": 7}) == run
    assert complete(run)[0].steps == 7


def test_only_what_was_chosen_is_told() -> None:
    run = Run(scene=Scene(prompt="a"), model="playground", device="cpu")

    def told(**given: Any) -> str:
        return complete(run.model_copy(update=given))[1]

    assert told().startswith("by default float32, 25 steps, guidance 5: UNets run in float32 on cpu; steps and")
    assert told(steps=7, guidance_scale=3.0) == "by default float32: UNets run in float32 on cpu"
    assert told(dtype="float32", steps=7).startswith("by default guidance 5: steps and guidance are those of the small")
    assert told(dtype="float32", steps=7, guidance_scale=3.0) == ""


def _opens_nothing(*_: Any, **__: Any) -> None:
    raise ValueError("far enough")


def test_every_command_that_chooses_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = "by default float32, 25 steps: UNets run in float32 on cpu; steps and guidance are those of the small"
    for module in (images, worker):
        monkeypatch.setattr(module, "open_model", _opens_nothing)
    scene = tmp_path / "cat.json"
    scene.write_text('{"prompt": "a red cat"}')
    options = ("--guidance", 4, "--device", "cpu", "--out", tmp_path / "out")
    assert chosen in flat(call("run", "playground", "--prompt", "a red cat", *options, code=2).output)
    assert chosen in flat(call("batch", scene, "--model", "playground", *options, code=2).output)


def test_the_server_tells_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from lora_compose.compose.serve import launch

    monkeypatch.setattr(launch, "open_model", _opens_nothing)
    loras = playground_lora("cat").parent
    told = flat(call("serve", "playground", "--loras", loras, "--device", "cpu", "--steps", 9, code=2).output)
    assert "by default float32, 25 steps, guidance 5: " in told
    assert "a request that names no steps gets 9, the most that it may have (--steps)" in told


def test_weights_in_half_precision_are_opened_where_every_component_has_them() -> None:
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    both = ("unet/a.safetensors", "unet/a.fp16.safetensors", "vae/b.safetensors", "vae/b.fp16.safetensors")
    assert variant_in(ModelFacts(XL, index, {}, both), "float16") == "fp16"
    assert variant_in(ModelFacts(XL, index, {}, both), "float32") is None
    assert variant_in(ModelFacts(XL, index, {}, (*both[:3], "other/c.fp16.safetensors")), "float16") is None
    assert variant_in(ModelFacts(XL, index, {}, both[1::2]), "float32") == "fp16", "nothing else is there"
    assert variant_in(ModelFacts(XL, index, {}, ()), "float16") is None


def test_the_facts_of_a_folder_are_read_without_opening_it() -> None:
    unet, transformer = facts_of("playground"), facts_of("playground-flux")
    assert (unet.family, unet.own_size, unet.has_unet) == (SD, (SIZE, SIZE), True)
    assert (transformer.family, transformer.own_size, transformer.has_unet) == (FLUX, (SIZE, SIZE), False)
    assert "unet/diffusion_pytorch_model.safetensors" in unet.files
    assert unet.parts["scheduler"]["_class_name"] == SCHEDULER


def test_the_small_models_are_known_by_their_folders_too_and_others_by_their_names(tmp_path: Path) -> None:
    assert facts_of(str(playground_model())).shipped
    copied = tmp_path / "copied"
    shutil.copytree(playground_model(), copied, ignore=shutil.ignore_patterns("*.safetensors"))
    found = facts_of(str(copied))
    assert (found.name, found.shipped) == ("copied", False)
    assert defaults_for("cpu", found).steps == ROWS["Stable Diffusion 1.x"].steps


def test_the_size_is_not_known_without_the_configuration_of_a_vae() -> None:
    assert facts(FLUX).own_size is None
    assert facts(FLUX, vae={"sample_size": 32}).own_size == (1024, 1024), "diffusers' default says nothing"


def table() -> list[str]:
    """The table of defaults in the docs, from the code."""
    rows = [
        "| model | steps | guidance | size | CUDA, XPU | in Python | told by | from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in ROWS.items():
        chosen, (steps, scale) = defaults_for("cuda", one.facts), call_defaults(one.facts.family)
        size = "{} x {}".format(*one.facts.own_size or ())
        rows.append(
            f"| {name} | {chosen.steps} | {chosen.guidance_scale:g} | {size} | {chosen.dtype} | {steps}, {scale:g} "
            f"| {one.told} | {one.source} |"
        )
    dtype = Run.model_fields["dtype"].default
    rows.append(
        f"| `demo`, and the page's example | {STEPS} | {GUIDANCE:g} | {SIZE} x {SIZE} | {dtype} "
        "| | | its images were looked at with these |"
    )
    return rows


def test_the_table_of_defaults_in_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    found = text.partition("## Defaults\n")[2].partition("\n## ")[0]
    assert [line for line in found.splitlines() if line.startswith("|")] == table()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small FLUX.2-klein that says that it is distilled."""
    return str(saved_klein(tmp_path_factory.mktemp("distilled") / "model", distilled=True))


FEW = ROWS["FLUX.2-klein"].steps, ROWS["FLUX.2-klein"].guidance


def test_the_command_line_makes_images_of_a_distilled_model_in_its_steps(distilled: str, tmp_path: Path) -> None:
    call("run", distilled, "--prompt", "a cat", "--device", "cpu", "--out", tmp_path)
    made = read_record(tmp_path / "0.png").run
    assert (made.steps, made.guidance_scale, made.dtype) == (*FEW, "float32")
    said = flat(call("check", distilled, "--prompt", "a cat", "--device", "cpu").output)
    assert "float32, 4 steps, guidance 1: transformers run in float32 on cpu; it is distilled to few steps" in said


def test_a_batch_of_a_distilled_model_has_its_steps(distilled: str, tmp_path: Path) -> None:
    (tmp_path / "scene.yaml").write_text("prompt: a cat\n", encoding="utf-8")
    (result,) = run_batch(
        read_entries([tmp_path / "scene.yaml"]).entries, BatchSettings(model=distilled, device="cpu"), tmp_path / "out"
    )
    assert result.path is not None
    made = read_record(result.path).run
    assert (made.steps, made.guidance_scale) == FEW
    assert with_defaults(BatchSettings(model=distilled, device="cpu", steps=9))[0].steps == 9


def test_the_server_of_a_distilled_model_has_its_steps(
    distilled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from lora_compose.compose.serve import launch
    from lora_compose.compose.serve.door import Access
    from lora_compose.compose.serve.requests import Limits

    begun: list[Any] = []
    monkeypatch.setattr(launch, "run_server", lambda *given: begun.append(given))
    run = Run(scene=Scene(prompt="-"), model=distilled, device="cpu")
    save_file(dict(as_file(random_lora_of_all(flux2_transformer(), 0))), tmp_path / "cat.safetensors")
    launch.serve(run, tmp_path, Access(), 0, Limits(), lora_memory=0)
    ((web, engine),) = begun
    with server(web.config.app, engine) as port:
        _, body, _ = answer(port, "/images", {"prompt": "a cat"})
    made = record_in(BytesIO(body), "the answer").run
    assert (made.steps, made.guidance_scale) == FEW


def test_what_is_filled_in_begins_with_the_defaults_of_the_small_models() -> None:
    batch, run = BatchSettings.model_fields, Run.model_fields
    for fields in (batch, run):
        assert (fields["steps"].default, fields["guidance_scale"].default) == OF_SHIPPED
