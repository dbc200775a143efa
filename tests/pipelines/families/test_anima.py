"""What only Anima has: a modular pipeline, a text conditioner, a padding mask, and methods that move latents."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from diffusers.models.transformers import transformer_cosmos
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from diffusers.utils import import_utils
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from anima import ANIMA, anima_pipeline
from lora_compose import Clora, ComposePipeline, Concept, Draft, FreeFuse, LoraComposer, Regional
from lora_compose.attention import Lora
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.formats.recognise import guess_family
from pairs import in_pairs
from transformer_families import (
    BOXES,
    CALL,
    CELLS,
    PROMPT,
    TOKENS,
    Places,
    as_file,
    dense_loras,
    latents_of,
    pipeline_with_concepts,
    plain_latents,
    random_lora_of_all,
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(ANIMA, tmp_path_factory.mktemp("loras"))


IMAGE = Image.fromarray((np.random.default_rng(0).random((128, 128, 3)) * 255).astype("u1"))
METHODS = {
    "draft": (Draft(), ["cat", "dog"]),
    "clora": (Clora(), ["cat", "dog"]),
    "clora, branches": (Clora(fuse="branches"), ["cat", "dog"]),
    "freefuse": (FreeFuse(), ["cat", "dog"]),
    "lora-composer": (LoraComposer(), BOXES),
    "lora-composer, overlap": (
        LoraComposer(threshold=0.5, apart=0.0),
        [Concept(name="cat", region=(0, 0, 80, 128)), Concept(name="dog", region=(48, 0, 128, 128))],
    ),
}


def test_methods_that_read_maps_or_give_each_region_a_text_run_and_leave_nothing(pipe):
    plain, config = latents_of(pipe, **ANIMA.guided), dict(pipe.transformer.config)
    merged = latents_of(pipe, concepts=["cat", "dog"], method="merge", **ANIMA.guided)
    for name, (method, concepts) in METHODS.items():
        found = latents_of(pipe, concepts=concepts, method=method, **ANIMA.guided)
        assert found.isfinite().all(), name
        assert (found - merged).abs().max() > 1e-3, name
    assert torch.equal(latents_of(pipe, **ANIMA.guided), plain)
    assert dict(pipe.transformer.config) == config


def test_methods_that_move_latents_start_from_the_image_where_its_noise_is_all(pipe):
    method, concepts = METHODS["clora"]
    given = {**ANIMA.guided, "concepts": concepts, "method": method}
    found = latents_of(pipe, image=IMAGE, strength=1.0, **given)
    torch.testing.assert_close(found, latents_of(pipe, **given), atol=1e-6, rtol=0)
    assert (latents_of(pipe, image=IMAGE, strength=0.5, **given) - found).abs().max() > 0.1


def test_lora_composer_without_updates_equals_a_pass_for_each_region(pipe):
    """Regions that fill the image, no isolation: every cell reads one text, with the LoRA of its region."""
    still = LoraComposer(isolate=False, most_updates=0.0, apart=0.0)
    alone = [Concept(name="cat", region=(0, 0, 128, 128))]
    found = latents_of(pipe, prompt="a sks cat on grass", concepts=alone, method=still, **ANIMA.unguided)
    expected = latents_of(pipe, prompt="a sks cat on grass", concepts=["cat"], method="merge", **ANIMA.unguided)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


REGIONS = {
    "apart": ((0, 0, 48, 128), (80, 0, 128, 128)),  # 16 pixels a cell; two columns between them are background
    "overlapping": ((0, 0, 80, 128), (48, 0, 128, 128)),
}
REGION_TEXTS = ("on grass", "a sks cat on grass", "a zwx dog on grass")


class Masked(CosmosAttnProcessor2_0):
    """diffusers' attention under dense masks; the texts of background and regions follow one another.

    Attributes:
        member: 1 where a cell is in a region. Shape: [cells, regions].
        reading: The text that is read now, for the LoRA of the output.
    """

    def __init__(self, member: Tensor, *, isolate: bool) -> None:
        super().__init__()
        self.reading = 0
        times = member.sum(dim=1, keepdim=True)
        self.shares = member / times.clamp(min=1)
        self.reads = torch.cat([(times == 0).float(), self.shares], dim=1)
        self.seen = (member @ member.T > 0) | (times == 0) | (times == 0).T if isolate else None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, self.seen, image_rotary_emb)
        texts = encoder_hidden_states.shape[1] // TOKENS
        if texts == 1:  # the negative prompt, in all regions
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        outputs = []
        for self.reading in range(texts):
            own = torch.arange(texts * TOKENS) // TOKENS == self.reading
            allowed = own.expand(len(self.reads), -1)
            outputs.append(super().__call__(attn, hidden_states, encoder_hidden_states, allowed))
        return torch.einsum("cn,nrcd->rcd", self.reads, torch.stack(outputs))

    def gate(self, name: str, x: Tensor, places: Places) -> Tensor:
        """Where LoRAs act in a layer: on the output of cross-attention the one whose text was read."""
        if name.endswith("attn2.to_out.0") and places.text.shape[1] > TOKENS:
            return places.text[:, TOKENS * self.reading, None]
        return ANIMA.gate(name, x, places)

    def places(self, unconditional: Sequence[bool]) -> Places:
        """Each LoRA in its region and on its region's text, and in all modulation layers; on prompts only."""
        if unconditional[0]:
            return Places(torch.zeros(1, TOKENS, 2), torch.zeros(1, CELLS**2, 2), torch.zeros(1, 2))
        text = torch.cat([torch.zeros(1, 2), torch.eye(2)]).repeat_interleave(TOKENS, dim=0)[None]
        return Places(text, self.shares[None], torch.ones(1, 2))


def text_of(plain: Any, prompt: str) -> Tensor:
    """What diffusers' transformer reads of a prompt."""
    read = []
    hook = plain.transformer.register_forward_pre_hook(
        lambda _, args, named: read.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    plain_latents(ANIMA, plain, **{**CALL, "prompt": prompt, "num_inference_steps": 1}, **ANIMA.unguided)
    hook.remove()
    return read[0]


@pytest.mark.parametrize(("boxes", "isolate"), in_pairs(REGIONS, [False, True]))
def test_every_cell_reads_the_text_of_its_region_as_under_dense_masks(pipe, boxes, isolate):
    """Of `lora-composer` without updates: diffusers' pipeline with dense masks and dense deltas gives the same."""
    regions = REGIONS[boxes]
    concepts = [Concept(name=name, region=box) for name, box in zip(("cat", "dog"), regions, strict=True)]
    method = LoraComposer(isolate=isolate, most_updates=0.0, apart=0.0)
    call = {**CALL, "num_inference_steps": 1, **ANIMA.guided}
    found = latents_of(pipe, concepts=concepts, method=method, **call)
    plain = anima_pipeline()
    scene, texts = text_of(plain, PROMPT), torch.cat([text_of(plain, text) for text in REGION_TEXTS], dim=1)
    member = torch.zeros(CELLS, CELLS, 2)
    for i, (left, _, right, _) in enumerate(regions):
        member[:, left // 16 : right // 16, i] = 1
    masked = Masked(member.flatten(0, 1), isolate=isolate)
    for name, module in plain.transformer.named_modules():
        if name.endswith((".attn1", ".attn2")):
            module.set_processor(masked)

    def with_texts(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = named["encoder_hidden_states"]
        return args, {**named, "encoder_hidden_states": texts if torch.equal(given, scene) else given}

    plain.transformer.register_forward_pre_hook(with_texts, with_kwargs=True)
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    family = replace(ANIMA, gate=masked.gate)
    with dense_loras(family, plain.transformer, loras, masked.places, guided=True):
        expected = plain_latents(ANIMA, plain, **call)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (found - latents_of(pipe, concepts=concepts, method="regional", **call)).abs().max() > 0.01


@pytest.mark.parametrize(("settings", "message"), [
    ({"texts": "regions"}, "in this model the image reads the text by cross-attention: use method='lora-composer'"),
    ({"isolate": True}, "isolate needs a transformer that attends to text and image in one sequence"),
])  # fmt: skip
def test_regional_has_one_text_for_all_regions_and_says_why(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        latents_of(pipe, concepts=BOXES, method=Regional(**settings), **ANIMA.guided)


def test_it_opens_as_diffusers_saves_it_and_the_other_way_round(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert "concepts" in (tmp_path / "README.md").read_text()
    opened: Any = ComposePipeline.from_pretrained(tmp_path)
    assert type(opened) is type(pipe)
    found, expected = (latents_of(one, **ANIMA.guided) for one in (opened, pipe))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # weights that are mapped lie elsewhere in memory
    other: Any = ComposePipeline.from_pipe(opened.modular())
    assert type(other) is type(pipe)
    assert other.transformer is opened.transformer
    plain: Any = ANIMA.plain(**anima_pipeline().components).pipe
    assert plain.transformer.dtype == torch.float32
    half: Any = ComposePipeline.from_pipe(plain, dtype=torch.bfloat16)
    assert ComposePipeline.from_pipe(half, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert half.transformer.dtype == half.text_conditioner.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"no vae; call its load_components\(\) first"):
        ComposePipeline.from_pipe(empty_of_vae(plain))


def test_a_call_without_concepts_has_the_progress_bar_that_was_set(pipe, capsys):
    for options, shown in (({}, True), ({"disable": True}, False)):
        pipe.set_progress_bar_config(**options)
        latents_of(pipe, **ANIMA.unguided)
        assert ("2/2" in capsys.readouterr().err) == shown


def empty_of_vae(plain: Any) -> Any:
    """A modular pipeline whose VAE has not been loaded."""
    made: Any = type(plain)(blocks=plain.blocks)
    made.update_components(**{name: part for name, part in plain.components.items() if name not in ("vae", "guider")})
    return made


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers finds where torchvision is not installed."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(import_utils, "_torchvision_available", False)
    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)


@pytest.mark.skipif(not import_utils.is_torchvision_available(), reason="torchvision is not installed")
def test_the_padding_mask_is_a_channel_of_zeros(pipe, tmp_path):
    check_padding_mask(pipe, tmp_path)


@pytest.mark.usefixtures("without_torchvision")
def test_the_padding_mask_needs_no_torchvision_except_in_plain_calls_of_an_offloaded_model(pipe, tmp_path):
    masked = check_padding_mask(pipe, tmp_path)
    with pytest.raises(NameError, match="transforms"):  # of torchvision, which is looked for in diffusers' own call
        plain_latents(ANIMA, masked, **CALL, **ANIMA.guided)
    cpu_offload(masked.transformer, torch.device("cpu"))
    assert latents_of(masked, concepts=["cat"], method="merge", **ANIMA.guided).isfinite().all()
    with pytest.raises(ValueError, match="an offloaded Anima needs torchvision in calls without concepts"):
        latents_of(masked, **ANIMA.guided)


def check_padding_mask(pipe: Any, tmp_path: Path) -> Any:
    """A model whose weights for the mask are left out gives the same as the one with them, which is returned."""
    masked = anima_pipeline(concat_padding_mask=True)
    weight = masked.transformer.patch_embed.proj.weight.data.unflatten(1, (5, 4))
    bare = anima_pipeline()
    state = masked.transformer.state_dict() | {"patch_embed.proj.weight": weight[:, :4].flatten(1)}
    bare.transformer.load_state_dict(state)
    bare.text_conditioner.load_state_dict(masked.text_conditioner.state_dict())
    bare.text_encoder.load_state_dict(masked.text_encoder.state_dict())
    for one in (masked, bare):
        load_cat(one, pipe, tmp_path)
    for given in ({}, {"concepts": ["cat"], "method": "merge"}):
        found, expected = (latents_of(one, **given, **ANIMA.guided) for one in (masked, bare))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert masked.transformer.config.concat_padding_mask
    assert masked.transformer._forward_pre_hooks == {}
    return masked


def load_cat(pipe: Any, of: Any, folder: Path) -> None:
    """Without the layer that the mask makes wider."""
    lora = {name: one for name, one in of.resolve_concepts(["cat"])[0].factors.model.items() if "patch" not in name}
    save_file(dict(as_file(lora)), folder / "cat.safetensors")
    pipe.load_concept(folder / "cat.safetensors", trigger="sks", class_word="cat")


def original(lora: Lora, conditioner: Lora) -> dict[str, Tensor]:
    """A file as ComfyUI's trainers write it."""
    names = {
        "transformer_blocks.": "blocks.", "norm1.linear_": "adaln_modulation_self_attn.",
        "norm2.linear_": "adaln_modulation_cross_attn.", "norm3.linear_": "adaln_modulation_mlp.",
        "attn1.to_out.0": "self_attn.output_proj", "attn2.to_out.0": "cross_attn.output_proj",
        "attn1.to_": "self_attn.", "attn2.to_": "cross_attn.", "ff.net.0.proj": "mlp.layer1", "ff.net.2": "mlp.layer2",
        "norm_out.linear_": "final_layer.adaln_modulation.", "proj_out": "final_layer.linear",
        "time_embed.t_embedder": "t_embedder.1", "patch_embed.proj": "x_embedder.proj.1",
    }  # fmt: skip
    found = {}
    for layer, factors in lora.items():
        name = layer
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith(("attn.q", "attn.k", "attn.v")):
            name += "_proj"
        found[f"diffusion_model.{name}"] = factors
    found |= {f"diffusion_model.llm_adapter.{layer}": factors for layer, factors in conditioner.items()}
    return {
        f"{name}.lora_{side}.weight": one for name, f in found.items() for side, one in (("A", f.down), ("B", f.up))
    }


@pytest.mark.parametrize("spelling", ["comfy", "kohya", "diffusers"])
def test_files_of_all_spellings_change_the_layers_that_diffusers_converter_names(pipe, tmp_path, spelling):
    lora, conditioner = random_lora_of_all(pipe.transformer, 0), random_lora_of_all(pipe.text_conditioner, 1)
    comfy = original(lora, conditioner)
    theirs = _convert_non_diffusers_anima_lora_to_diffusers(comfy)
    tensors = {"comfy": comfy, "diffusers": theirs}.get(spelling) or {
        key.removesuffix(end).replace("diffusion_model.", "lora_unet_").replace(".", "_") + kohya: tensor
        for key, tensor in comfy.items()
        for end, kohya in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight"))
        if key.endswith(end)
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "it.safetensors")
    found = match(read_lora(tmp_path / "it.safetensors"), pipe)
    assert found.unmatched == ()
    parts = {"transformer": found.model, "text_conditioner": found.text_encoders["text_conditioner"]}
    made = {f"{part}.{name}.lora_A.weight": one.down for part, layers in parts.items() for name, one in layers.items()}
    assert made.keys() == {key for key in theirs if key.endswith("lora_A.weight")}
    for key, down in made.items():
        assert torch.equal(down, theirs[key])


@pytest.mark.parametrize("spelling", ["comfy", "kohya", "diffusers"])
def test_files_are_named_as_anima_s(spelling):
    keys = {
        "comfy": "diffusion_model.blocks.0.cross_attn.output_proj.lora_A.weight",
        "kohya": "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight",
        "diffusers": "transformer.transformer_blocks.0.norm1.linear_1.lora_A.weight",
    }
    down = keys[spelling]
    up = down.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    guess = guess_family({down: (4, 2048), up: (2048, 4)}, {})
    assert (guess.family, guess.supported) == ("Anima", True)


def test_a_lora_of_the_text_conditioner_acts_as_in_the_weights(pipe, tmp_path):
    conditioner = random_lora_of_all(pipe.text_conditioner, 1, size=0.1)
    own = anima_pipeline()
    save_file(original(random_lora_of_all(own.transformer, 0), conditioner), tmp_path / "it.safetensors")
    own.load_concept(tmp_path / "it.safetensors", name="cat", trigger="sks", class_word="cat")
    found = latents_of(own, concepts=["cat"], method="merge", **ANIMA.guided)
    factors = own.resolve_concepts(["cat"])[0].factors
    for model, lora in (
        (own.transformer, factors.model),
        (own.text_conditioner, factors.text_encoders["text_conditioner"]),
    ):
        for name, one in lora.items():
            model.get_submodule(name).weight.data += one.delta()
    torch.testing.assert_close(found, latents_of(own, **ANIMA.guided), atol=3e-5, rtol=0)


def test_the_call_has_the_inputs_of_the_modular_pipeline(pipe):
    theirs = {one.name: one.default for one in pipe.modular().blocks.inputs if one.name is not None}
    ours = signature(type(pipe).__call__).parameters
    assert theirs.keys() - ours.keys() == {"image_latents"}
    shared = [name for name in theirs if name in ours and name != "strength"]
    assert {name: ours[name].default for name in shared} == {name: theirs[name] for name in shared}
    assert ours["strength"].default is None
    assert theirs["strength"] == 0.9
    assert pipe.steps_from_image(10, None, inpaints=False) == 9


REFUSED = {
    "no text": ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
    "less guidance than none": ({"guidance_scale": 0.5}, "guidance_scale must be at least 1 with concepts"),
    "a mask": (
        {"image": torch.zeros(1, 3, 128, 128), "mask_image": (0, 0, 64, 64)},
        "diffusers has no inpainting for Anima; it has image-to-image",
    ),
    "latents as the start": ({"image": torch.zeros(1, 4, 16, 16)}, r"a tensor of torch.float32 with the shape \[1, 4"),
    "latents and an image": ({"image": IMAGE, "latents": torch.zeros(1, 4, 16, 16)}, "latents cannot be given with an"),
    "a strength alone": ({"strength": 0.5}, "strength needs an image"),
    "no step": ({"image": IMAGE, "strength": 0.0}, "strength=0 leaves none of the 2 steps"),
    "too large": ({"width": 512}, "at most 256 pixels a side, not 512 x 128"),
    "no prompt": ({"prompt": None}, "prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_in_words(pipe, case):
    given, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        pipe(**{**CALL, **given}, concepts=["cat"], method="merge")


def test_without_concepts_a_size_that_makes_no_patches_is_refused_with_an_image_too(pipe):
    for image in (None, IMAGE):
        with pytest.raises(ValueError, match=r"(divisible by|multiples of) 16"):
            pipe(**{**CALL, "width": 120, "image": image})


def test_callbacks_are_for_calls_with_concepts(pipe):
    steps = []

    def note(_: Any, step: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {}

    latents_of(pipe, concepts=["cat"], method="merge", callback_on_step_end=note)
    assert steps == [0, 1]
    assert pipe.num_timesteps == 2
    with pytest.raises(ValueError, match="modular pipelines have no callbacks"):
        latents_of(pipe, callback_on_step_end=note)
