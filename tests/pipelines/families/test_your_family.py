"""A model family is a backbone, a pipeline and a line in each registry, as CONTRIBUTING.md says.

Chroma, stripped and under other names, stands for the new family, in place of its own lines in the registries.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from chroma import CHROMA, chroma_pipeline
from guides import left_out
from lora_compose import ComposePipeline
from lora_compose.attention.backbones import BACKBONES, backbone_of
from lora_compose.attention.backbones.joint import JointBackbone, image_positions, packed, unpacked
from lora_compose.attention.sites import Site
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.families.chroma import ComposeChromaPipeline
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.formats import recognise, transformer_names
from pairs import slow_but
from transformer_families import (
    CALL,
    METHODS,
    as_file,
    assert_equals_dense_deltas,
    latents_of,
    plain_latents,
    random_lora_of_all,
)


class YourBackbone(JointBackbone):
    """What `attention/backbones/your_model.py` would have."""

    table = (
        (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", Site("text", "image", level=1)),
        (
            r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net\..+)",
            Site("text"),
        ),
        (
            r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.net\..+)",
            Site("image", level=1),
        ),
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        tokens, mask = packed(latents), (added or {})["text_mask"]
        velocity = self.model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_ids=image_positions(latents),
            txt_ids=torch.zeros(text.shape[1], 3),
            attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity, latents.shape[-2:])


class YourPipeline(FlowMatchingPipeline, ChromaPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """What `pipelines/families/your_family.py` would have; a real one reads all arguments."""

    family = "Yours"
    reads = ("negative_prompt", "sigmas", "joint_attention_kwargs", "max_sequence_length")
    architecture = "yours"
    transformer_class = ChromaTransformer2DModel

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        return False

    @front(ChromaPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        given = begun.given
        _, size = self._source(begun)

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            encode_prompt: Any = self.encode_prompt
            text, _, mask, *_ = encode_prompt(
                words, device=device, do_classifier_free_guidance=False,
                max_sequence_length=given["max_sequence_length"],
            )  # fmt: skip
            return text, {"text_mask": mask}

        prompts, guider = begun.prompts(given["max_sequence_length"]), ClassifierFree(given["guidance_scale"])
        return self._text_request(begun, prompts, guider, encode, size=size)


YOURS = replace(CHROMA, pipeline=partial(chroma_pipeline, YourPipeline), image_tasks={})


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """A line in each registry, in place of Chroma's: backbones, pipelines, and names in LoRA files."""
    file: Any = ModuleType("your_model")
    file.YourBackbone = YourBackbone
    kind = ChromaTransformer2DModel.__name__
    families = [family for family in ComposePipeline.families if family is not ComposeChromaPipeline]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "lora_compose.attention.backbones.your_model", file)
        patched.setitem(BACKBONES, kind, "your_model.YourBackbone")  # pyright: ignore[reportArgumentType]
        patched.setattr(ComposePipeline, "families", [*families, YourPipeline])
        others = [known for known in recognise.TRANSFORMERS if known.kind != kind]
        yours = recognise.Transformer("Yours", kind, r"yours[._]\d")
        patched.setattr(recognise, "TRANSFORMERS", (yours, *others))
        table = [(r"transformer_blocks\.(\d+)\.ff\.net\.2", r"yours.\1.out")]
        patched.setitem(transformer_names._TABLES, kind, table)  # pyright: ignore[reportArgumentType]
        yield


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline with a cat and a dog, whose LoRAs are on every layer of the table."""
    pipe, folder = YOURS.pipeline(), tmp_path_factory.mktemp("loras")
    sites = backbone_of(pipe.transformer).sites
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        lora = {
            layer: factors for layer, factors in random_lora_of_all(pipe.transformer, seed).items() if layer in sites
        }
        save_file(dict(as_file(lora)), folder / f"{name}.safetensors")
        pipe.load_concept(folder / f"{name}.safetensors", trigger=trigger, class_word=name)
    return pipe


def test_a_new_family_is_opened_by_its_model() -> None:
    assert type(ComposePipeline.from_pipe(chroma_pipeline(ChromaPipeline))) is YourPipeline


@pytest.mark.parametrize("method", slow_but(("merge", "regional"), METHODS))
def test_two_loras_compose_as_dense_deltas_do(pipe: Any, method: str) -> None:
    assert_equals_dense_deltas(YOURS, pipe, method)


def test_without_concepts_it_does_exactly_what_diffusers_does(pipe: Any) -> None:
    assert torch.equal(latents_of(pipe, **YOURS.guided), plain_latents(YOURS, pipe, **CALL, **YOURS.guided))


def test_the_names_of_its_original_checkpoint_are_known(pipe: Any, tmp_path: Path) -> None:
    ours, original = "transformer_blocks.0.ff.net.2", "diffusion_model.yours.0.out"
    factors = random_lora_of_all(pipe.transformer, 0)[ours]
    tensors = {f"{original}.lora_A.weight": factors.down, f"{original}.lora_B.weight": factors.up}
    save_file(tensors, tmp_path / "bird.safetensors")
    pipe.load_concept(tmp_path / "bird.safetensors", trigger="xlo")
    (bird,) = pipe.resolve_concepts(["bird"])
    pipe.unload_concept("bird")
    assert list(bird.factors.model) == [ours]
    guess = recognise.guess_family({key: tensor.shape for key, tensor in tensors.items()}, {})
    assert (guess.family, guess.supported) == ("Yours", True)


OWN = {
    r"krea ?2": ("attention/backbones/krea2.py", "pipelines/families/krea2.py"),
    r"chroma": ("attention/backbones/chroma.py", "pipelines/families/chroma.py", "pipelines/families/flux.py"),
    r"qwen-?image-?edit": ("pipelines/families/qwen_image_edit.py",),
}
"""Families, and their own files: one from text alone, one with image tasks and training, one with references."""


@pytest.mark.parametrize("family", OWN)
def test_the_guide_names_every_file_that_a_family_touches(family: str) -> None:
    assert left_out("Add a model family", family, OWN[family]) == set()
