"""Words that LoRA files bring with them, with vectors of their own, in prompts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components import State, attention_layers, random_lora, seeded, tiny_pipeline, tiny_xl_pipeline
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.formats.files import LoraError
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.textual_inversion import TextualInversions
from lora_compose.pipelines.text.tokens import locate
from pairs import slow_but

WIDTH, LAYERS = 24, 4  # of the tiny pipeline
PROMPT = "a <x1> <x2> and a sks cat"
BOXES = {"ed": (0, 0, 16, 32), "cat": (16, 0, 32, 32)}


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA file that brings words: `write(pipe, "name", {key: vectors})`."""

    def file(pipe: Any, name: str, words: Mapping[str, Tensor], seed: int = 0, size: float = 0.3) -> Path:
        tensors = {}
        for part in ("unet", "text_encoder"):
            for layer, factors in random_lora(getattr(pipe, part), seed, size=size, targets=("to_k", "q_proj")).items():
                tensors[f"{part}.{layer}.lora_A.weight"] = factors.down.contiguous()
                tensors[f"{part}.{layer}.lora_B.weight"] = factors.up.contiguous()
        path = tmp_path / f"{name}.safetensors"
        save_file({**tensors, **{key: vectors.contiguous() for key, vectors in words.items()}}, path)
        return path

    return file


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def layered(seed: int = 0, layers: int = LAYERS) -> dict[str, Tensor]:
    """Two words with vectors for every layer, as an ED-LoRA has them."""
    return {f"new_concept_embedding.<x{i}>": vectors(layers, WIDTH, seed=10 * seed + i) for i in (1, 2)}


def known(pipe: Any, text: str) -> Tensor:
    """The vectors of some words that the tokenizer knows."""
    ids = pipe.tokenizer(text, add_special_tokens=False).input_ids
    return pipe.text_encoder.get_input_embeddings().weight[ids].detach().clone()


def latents_of(pipe: Any, prompt: str, concepts: Any, method: str = "merge", **options: Any) -> Tensor:
    how: dict[str, Any] = {
        "num_inference_steps": 2, "output_type": "latent", "width": 32, "height": 32, "generator": seeded(),
    }  # fmt: skip
    return pipe(prompt, concepts=concepts, method=method, **how | options).images


def encoded(pipe: Any, prompts: list[str], concepts: list[str]) -> EncodedText:
    """What the text encoders say, without any LoRA in them."""
    device = torch.device("cpu")
    words = TextualInversions.of(pipe.resolve_concepts(concepts), pipe.components)
    encode = words.read_by(pipe, lambda own, negative: EncodedText(*pipe.encode_prompt(own, device, 1, True, negative)))
    return encode(prompts, [""] * len(prompts))


def test_each_layer_reads_its_own_vectors_in_forward_order(pipe: Any, write: Callable[..., Path]) -> None:
    """Every layer's text is that of plain diffusers with the word's vector of that layer."""
    path = write(pipe, "ed", layered())
    pipe.load_concept(path)
    found = encoded(pipe, [PROMPT, "a cat"], ["ed"]).prompt_embeds
    layers = [layer.name for layer in attention_layers(pipe.unet) if layer.cross]
    assert [name.split("_")[0] for name in layers] == ["down", "mid", "up", "up"]
    seen = {}
    hooks = [
        pipe.unet.get_submodule(f"{name}.to_k").register_forward_pre_hook(
            lambda module, given, name=name: seen.setdefault(name, given[0])
        )
        for name in layers
    ]
    concept = Concept(name="ed", blocks={"text": 0.0})
    latents_of(pipe, PROMPT, [concept], num_inference_steps=1, guidance_scale=1.0)
    for hook in hooks:
        hook.remove()
    for i, (name, own) in enumerate(zip(layers, found.split(WIDTH, dim=-1), strict=True)):
        plain = tiny_pipeline(StableDiffusionPipeline)
        for key, mine in layered().items():
            plain.load_textual_inversion({key.rpartition(".")[2]: mine[i]})
        expected = plain.encode_prompt([PROMPT, "a cat"], torch.device("cpu"), 1, False)[0]
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(seen[name], expected[:1])


def test_one_vector_in_all_layers_is_diffusers_own_textual_inversion(pipe: Any, write: Callable[..., Path]) -> None:
    """Layer-wise and bundled, the image is that of plain diffusers with this LoRA and this textual inversion."""
    mine = {f"<x{i}>": vectors(1, WIDTH, seed=i) for i in (1, 2)}
    same = {f"new_concept_embedding.{word}": vector.repeat(LAYERS, 1) for word, vector in mine.items()}
    pipe.load_concept(write(pipe, "ed", same))
    pipe.load_concept(write(pipe, "bundled", {f"bundle_emb.{word}": vector for word, vector in mine.items()}))
    plain = tiny_pipeline(StableDiffusionPipeline)
    plain.load_lora_weights(write(plain, "plain", {}), adapter_name="ed")
    for word, vector in mine.items():
        plain.load_textual_inversion({word: vector})
    prompt = "a <x1> <x2>, and a cat"
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "width": 32, "height": 32}
    negative = "an ugly <x2>"
    expected = plain(prompt, negative_prompt=negative, generator=seeded(), **how).images
    for name in ("ed", "bundled"):
        found = latents_of(pipe, prompt, [name], negative_prompt=negative)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (latents_of(pipe, prompt, [name], negative_prompt="an ugly") - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_word_with_the_vectors_of_known_words_is_as_good_as_they(family: str, write: Callable[..., Path]) -> None:
    """Of several tokens, and in SDXL for both encoders, whose pooled text is no other either."""
    pipe = tiny_pipeline() if family == "sd" else tiny_xl_pipeline()
    names = {"text_encoder": ("tokenizer", ""), "text_encoder_2": ("tokenizer_2", ".clip_g")}
    words = {}
    for part, (_, suffix) in names.items():
        if (model := getattr(pipe, part, None)) is not None:
            ids = pipe.tokenizer("sks cat dog", add_special_tokens=False).input_ids
            weight = model.get_input_embeddings().weight
            words[f"bundle_emb.<x1>{suffix}"] = weight[ids].detach().clone()
            for module in model.modules():
                if hasattr(module, "eos_token_id"):
                    module.eos_token_id = 2  # as SDXL's configurations have it
    assert len(words) == (1 if family == "sd" else 2)
    pipe.load_concept(write(pipe, "it", words))
    pipe.load_concept(write(pipe, "other", {}, seed=1), trigger="zwx")
    found = latents_of(pipe, "a <x1> and a zwx bear", ["it", "other"], "tara")
    by_letters = [Concept(name="it", trigger="sks cat dog"), "other"]
    torch.testing.assert_close(found, latents_of(pipe, "a sks cat dog and a zwx bear", by_letters, "tara"))


@pytest.mark.parametrize("method", slow_but(["composite", "clora"], ["composite", "clora", "lora-composer"]))
def test_every_kind_of_method_reads_words(pipe: Any, write: Callable[..., Path], method: str) -> None:
    """Layer-wise vectors that are those of known words give the image of these words, whatever the method."""
    ids = {"<x1>": "zwx", "<x2>": "dog"}
    same = {f"new_concept_embedding.{word}": known(pipe, text).repeat(LAYERS, 1) for word, text in ids.items()}
    pipe.load_concept(write(pipe, "ed", same), class_word="bear")
    pipe.load_concept(write(pipe, "cat", {}, seed=1), trigger="sks", class_word="cat")

    def concepts(**changes: Any) -> list[Concept]:
        boxed = method in ("regional", "lora-composer")
        return [
            Concept(name=name, region=BOXES[name] if boxed else None, **(changes if name == "ed" else {}))
            for name in ("ed", "cat")
        ]

    before = State(pipe)
    found = latents_of(pipe, "a <x1> <x2> bear and a sks cat", concepts(), method)
    before.assert_unchanged()
    expected = latents_of(pipe, "a zwx dog bear and a sks cat", concepts(trigger="zwx dog"), method)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_prompts_without_the_words_are_what_they_were(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()), trigger="sks")
    pipe.load_concept(write(pipe, "plain", {}), trigger="sks")
    for prompt in ("a sks cat", "a sks cat x1"):
        torch.testing.assert_close(latents_of(pipe, prompt, ["ed"]), latents_of(pipe, prompt, ["plain"]))


def test_text_is_encoded_once_per_layer_and_only_where_it_differs(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()), trigger="sks")
    pipe.load_concept(write(pipe, "bundled", {"bundle_emb.<x1>": vectors(2, WIDTH)}), trigger="sks")
    runs = []
    hook = pipe.text_encoder.register_forward_hook(lambda *given: runs.append(given))
    counts = {}
    for prompt in ("a sks cat", "a sks cat of <x1>"):
        for name in ("ed", "bundled"):
            latents_of(pipe, prompt, [name], num_inference_steps=1)
            counts[prompt, name] = len(runs)
            runs.clear()
    hook.remove()
    assert [*counts.values()] == [2, 2, 2 * LAYERS, 2]


def test_keys_and_values_are_made_once_per_image(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()))
    runs = []
    layer = next(layer.name for layer in attention_layers(pipe.unet) if layer.cross)
    hook = pipe.unet.get_submodule(f"{layer}.to_k").register_forward_hook(lambda *given: runs.append(given))
    latents_of(pipe, PROMPT, ["ed"], num_inference_steps=4)
    hook.remove()
    assert len(runs) == 1


def test_a_controlnet_reads_the_mean_of_the_layers_texts(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()))
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    read = []
    net.register_forward_pre_hook(lambda _, args, given: read.append(given["encoder_hidden_states"]), with_kwargs=True)
    control = Control(model=net, image=Image.new("RGB", (32, 32)))
    concept = Concept(name="ed", blocks={"text": 0.0})
    latents_of(pipe, PROMPT, [concept], control=control, num_inference_steps=1, guidance_scale=1.0)
    by_layer = encoded(pipe, [PROMPT], ["ed"]).prompt_embeds.unflatten(-1, (LAYERS, WIDTH))
    torch.testing.assert_close(read, [by_layer.mean(dim=-2)])
    assert by_layer.std(dim=-2).max() > 0.1


def test_words_of_several_tokens_and_letters_stand_alone(pipe: Any, write: Callable[..., Path]) -> None:
    """The tokens of a trigger are all that its word has; a word of letters is none inside another."""
    pipe.load_concept(write(pipe, "it", {"bundle_emb.zq": vectors(12, WIDTH)}))
    (tokenizer,) = pipe.tokenizers_for(pipe.resolve_concepts(["it"]))
    prompt = "a zq, zqs and a cat"
    how: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "verbose": False}
    ids = tokenizer(prompt, **how).input_ids
    first = len(pipe.tokenizer)
    assert ids[1:13] == [*range(first, first + 12)]
    assert [ids[0], *ids[13:]] == pipe.tokenizer("a, zqs and a cat", **how).input_ids
    assert locate(tokenizer, prompt, pipe.concepts["it"]).trigger == (*range(2, 14),)


def test_a_prompt_without_the_trigger_is_refused(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()))
    with pytest.raises(ValueError, match="the trigger '<x1> <x2>' of concept 'ed' is not in the prompt 'a <x1>'"):
        latents_of(pipe, "a <x1>", ["ed"])


@pytest.mark.parametrize(
    ("shape", "message"),
    {(3, WIDTH): "'<x1>' has vectors for 3 cross-attention layers, the model has 4",
     (LAYERS, 32): "the vectors of '<x1>' have 32 numbers, text_encoder has words of 24"}.items(),
)  # fmt: skip
def test_vectors_that_do_not_fit_are_refused(
    pipe: Any, write: Callable[..., Path], shape: tuple[int, int], message: str
) -> None:
    path = write(pipe, "it", {"new_concept_embedding.<x1>": vectors(*shape)})
    with pytest.raises(LoraError, match=message):
        pipe.load_concept(path)
    assert pipe.concepts == {}


def test_words_are_refused_that_have_two_meanings(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()))
    pipe.load_concept(write(pipe, "other", layered(seed=1)))
    with pytest.raises(ValueError, match="the files of concepts 'ed' and 'other' both bring the word '<x1>'"):
        latents_of(pipe, PROMPT, ["ed", "other"])
    pipe.load_textual_inversion({"<x1>": vectors(1, WIDTH)})
    with pytest.raises(ValueError, match=r"the tokenizer knows '<x1>' already.*unload_textual_inversion\('<x1>'\)"):
        latents_of(pipe, PROMPT, ["ed"])


def test_nothing_stays_after_an_error(pipe: Any, write: Callable[..., Path]) -> None:
    pipe.load_concept(write(pipe, "ed", layered()))
    before, tokenizer, config = State(pipe), pipe.tokenizer, dict(pipe.config)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.text_encoder.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        latents_of(pipe, PROMPT, ["ed"])
    hook.remove()
    before.assert_unchanged()
    assert pipe.tokenizer is tokenizer
    assert dict(pipe.config) == config
    assert "<x1>" not in tokenizer.get_vocab()
