"""LoRA-Composer against independent references: diffusers' own LoRAs, and the method written out on a plain model.

Yang et al., "LoRA-Composer", arXiv 2403.11627.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_compose.pipelines.engine import Engine
from torch import Tensor

from components import ATTENTION, EVERYTHING, random_lora, seeded, tiny_pipeline
from lora_compose.attention import Lora
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods.lora_composer import Composing, LoraComposer
from lora_compose.pipelines.scene import Concept
from reference import FullGates, WrittenOut, cells, with_reference

PROMPT = "a sks cat and a zwx dog on grass"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "mjq"}
READ = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TEXT = ("q_proj", "v_proj", "fc1")
CANVAS, LEFT, RIGHT = (0, 0, 128, 128), (0, 0, 64, 128), (64, 0, 128, 128)
QUIET = LoraComposer(step_size=0, apart=0, rows="all")
OFF = LoraComposer(inject="off", isolate=False, step_size=0, apart=0, background="scene", rows="all")


@dataclass(frozen=True)
class Seen(LoraComposer):
    """LoRA-Composer whose processes can be looked at after the call."""

    processes: list[Composing] = field(default_factory=list)

    def start(self, engine: Engine) -> Composing:
        process: Any = super().start(engine)
        self.processes.append(process)
        return self.processes[-1]


@pytest.fixture
def tiny() -> ComposeStableDiffusionPipeline:
    """A still smaller pipeline than the common one."""
    return tiny_pipeline()


@pytest.fixture
def plain_tiny() -> StableDiffusionPipeline:
    """diffusers' own pipeline with the same weights as `tiny`."""
    return tiny_pipeline(StableDiffusionPipeline)


@pytest.fixture
def load(write_lora) -> Callable[..., Lora]:
    """Loads a concept under a trigger and returns its factors: `load(pipe, "cat", targets=..., text=True)`."""

    def load(
        pipe: Any, name: str, trigger: str | None = None, *, text: bool = False, targets: tuple[str, ...] = ATTENTION
    ) -> Lora:
        seed, size = len(name) + ord(name[0]), 0.1 if targets == EVERYTHING else 0.3
        parts = {"unet": random_lora(pipe.unet, seed, targets=targets, size=size)}
        if text:
            parts["text_encoder"] = random_lora(pipe.text_encoder, seed, targets=TEXT)
        options = {"trigger": trigger or TRIGGERS.get(name), "class_word": name if name in TRIGGERS else None}
        pipe.load_concept(write_lora(f"{name}-file", **parts), name, **options)
        return parts["unet"]

    return load


@pytest.fixture
def composer(tiny, load) -> ComposeStableDiffusionPipeline:
    """A small pipeline with the concepts "cat" and "dog"."""
    load(tiny, "cat")
    load(tiny, "dog")
    return tiny


def side_by_side(**cat: Any) -> list[Concept]:
    return [Concept(name="cat", region=LEFT, **cat), Concept(name="dog", region=RIGHT)]


def latents_of(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    return pipe(prompt, **given | arguments).images


def with_adapter(pipe: Any, loaded: Any, name: str, weight: float = 1.0) -> Any:
    """A plain pipeline in which diffusers has loaded the file of a concept."""
    pipe.load_lora_weights(loaded.concepts[name].lora, adapter_name=name)
    pipe.set_adapters([name], [weight])
    return pipe


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# Against diffusers


@pytest.mark.parametrize(("trigger", "scene"), [(None, "on grass"), ("ohwx", "in ohwx style")])
def test_with_everything_off_the_background_concept_acts_as_in_diffusers(tiny, plain_tiny, load, trigger, scene):
    for name in ("cat", "dog"):
        load(tiny, name, text=True)
    load(tiny, "style", trigger, text=True, targets=EVERYTHING)
    concepts = [*side_by_side(), Concept(name="style", weight=0.7)]
    found = latents_of(tiny, f"a sks cat and a zwx dog {scene}", concepts=concepts, method=OFF)
    plain = latents_of(plain_tiny, f"a cat and a dog {scene}")
    expected = latents_of(with_adapter(plain_tiny, tiny, "style", 0.7), f"a cat and a dog {scene}")
    assert_close(found, expected)
    assert far_apart(expected, plain)


def test_with_everything_off_and_no_background_concept_it_is_the_plain_prompt(composer, plain_tiny):
    found = latents_of(composer, concepts=side_by_side(), method=OFF)
    assert_close(found, latents_of(plain_tiny, "a cat and a dog on grass"))


@pytest.mark.parametrize(
    "changes", [{}, {"inject": "attn2"}, {"isolate": False}, {"reinit": "copy"}, {"reinit": "swap"}], ids=str
)
def test_a_region_of_the_whole_canvas_is_an_ordinary_lora_whatever_the_scene_is(pipe, plain_pipe, load, changes):
    load(pipe, "cat", targets=READ, text=True)
    concepts = [Concept(name="cat", region=CANVAS, prompt="sks cat at night", negative_prompt="dark", weight=0.8)]
    method = LoraComposer(**{"step_size": 0, "apart": 0, "rows": "all"} | changes)
    expected = latents_of(with_adapter(plain_pipe, pipe, "cat", 0.8), "sks cat at night", negative_prompt="dark")
    for scene in ("a house", "sks cat in the water"):
        assert_close(latents_of(pipe, scene, concepts=concepts, method=method), expected)


@pytest.mark.parametrize("text", [False, True])
def test_only_full_injection_gives_all_of_a_lora_that_adapts_everything(pipe, plain_pipe, load, text):
    load(pipe, "cat", targets=EVERYTHING, text=text)
    concepts = [Concept(name="cat", region=CANVAS)]
    expected = latents_of(with_adapter(plain_pipe, pipe, "cat"), "a sks cat")
    full, read = (
        latents_of(pipe, "a sks cat", concepts=concepts, method=LoraComposer(inject=inject, **options))
        for inject in ("full", "attn2")
        for options in [{"step_size": 0, "apart": 0, "rows": "all"}]
    )
    assert_close(full, expected)
    assert far_apart(read, expected)


def test_without_guidance_it_does_not_matter_on_which_rows_loras_act(composer):
    images = [
        latents_of(composer, concepts=side_by_side(), guidance_scale=guidance, method=LoraComposer(rows=rows, apart=0))
        for guidance in (1.0, 5.0)
        for rows in ("cond_only", "all")
    ]
    assert torch.equal(images[0], images[1])
    assert far_apart(images[2], images[3])


# Against the method written out


APART = ((0, 0, 64, 128), (128, 64, 192, 128))
OVERLAPPING = ((0, 0, 128, 128), (64, 64, 192, 128))


@pytest.mark.parametrize(("inject", "isolate", "rows", "boxes"), [
    ("attn2", True, "all", APART), ("attn2", False, "cond_only", APART), ("full", False, "all", APART),
    ("full", True, "cond_only", APART), ("attn2", True, "all", OVERLAPPING), ("full", True, "cond_only", OVERLAPPING),
    ("attn2", True, "all", ((0, 0, 192, 128), (64, 32, 128, 128))),
])  # fmt: skip
@torch.no_grad()
def test_injection_and_isolation_equal_their_formula(pipe, plain_pipe, load, inject, isolate, rows, boxes):
    names, canvas = ("cat", "dog", "style"), (128, 192)
    loras = [load(pipe, name, targets=EVERYTHING) for name in names]
    method = LoraComposer(inject=inject, isolate=isolate, rows=rows, step_size=0, apart=0)
    concepts = [*(Concept(name=name, region=box) for name, box in zip(names[:2], boxes, strict=True)), "style"]
    found = latents_of(pipe, concepts=concepts, method=method, width=192, height=128, negative_prompt="dark")

    unet, scheduler = plain_pipe.unet, plain_pipe.scheduler
    acting = torch.tensor([1.0 if rows == "all" else 0.0, 1.0])
    prompts = ["on grass", "a sks cat on grass", "a zwx dog on grass"]
    encoded = [plain_pipe.encode_prompt(prompt, "cpu", 1, True, "dark") for prompt in prompts]
    texts = torch.stack([torch.cat([negative, positive]) for positive, negative in encoded])
    grids = [(-(-canvas[0] // side), -(-canvas[1] // side)) for side in (8, 16, 32, 64)]
    regions = {grid: torch.stack([cells(box, canvas, grid) for box in boxes], dim=-1) for grid in grids}
    flat = {grid[0] * grid[1]: member.flatten(0, 1) for grid, member in regions.items()}
    what = flat, acting[:, None, None], texts, [loras[2], *loras[:2]], isolate
    unet.set_attn_processor({n: WrittenOut(n.removesuffix(".processor"), *what) for n in unet.attn_processors})
    # In all other layers a concept acts in its region, if at all, and the background everywhere.
    rest = [{name: f for name, f in lora.items() if not name.endswith(READ)} for lora in loras]
    image = {}
    for grid, member in regions.items():
        times = member.sum(dim=-1, keepdim=True)
        gate = torch.cat([member / times.clamp(min=1), torch.ones(*grid, 1)], dim=-1)
        image[grid] = acting[:, None, None, None] * gate
    gates = FullGates(torch.zeros(2, 32, 3), image, acting[:, None].expand(2, 3))
    forward = with_reference(unet, rest if inject == "full" else [{}, {}, rest[2]], gates)
    latents = torch.randn(1, 4, 16, 24, generator=seeded())
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        uncond, cond = forward(torch.cat([latents, latents]), t, texts[0], return_dict=False)[0].chunk(2)
        latents = scheduler.step(uncond + 7.5 * (cond - uncond), t, latents).prev_sample
    assert_close(found, latents)


def test_every_mechanism_makes_another_image(composer):
    boxes = [Concept(name="cat", region=(0, 0, 64, 64)), Concept(name="dog", region=(72, 40, 128, 128))]
    changes: list[dict[str, Any]] = [
        {}, {"inject": "attn2"}, {"inject": "off"}, {"isolate": False}, {"rows": "cond_only"}, {"background": "scene"},
        {"reinit": "copy"}, {"reinit": "swap"}, {"apart": 1.0}, {"step_size": 0.2},
    ]  # fmt: skip
    images = [
        latents_of(composer, concepts=boxes, method=LoraComposer(**{"rows": "all", "step_size": 0, "apart": 0} | each))
        for each in changes
    ]  # fmt: skip
    assert all(far_apart(one, other) for i, one in enumerate(images) for other in images[:i])


# What acts where


def test_a_concept_of_weight_0_leaves_its_prompt_in_its_box(composer, write_lora):
    nothing = {
        name: type(factors)(factors.down, torch.zeros_like(factors.up), 1.0)
        for name, factors in random_lora(composer.unet, 0).items()
    }
    composer.load_concept(write_lora("nothing", unet=nothing), "nothing", trigger="sks", class_word="cat")
    dog = Concept(name="dog", region=RIGHT)
    found, expected, other = (
        latents_of(composer, concepts=[concept, dog], method=QUIET)
        for concept in (
            Concept(name="cat", region=LEFT, weight=0.0),
            Concept(name="nothing", region=LEFT),
            Concept(name="nothing", region=LEFT, prompt="sks at night"),
        )
    )
    assert_close(found, expected)
    assert far_apart(found, other)


def test_a_concept_of_weight_0_on_the_whole_canvas_is_the_model_with_its_prompt(composer, plain_tiny):
    concepts = [Concept(name="cat", region=CANVAS, weight=0.0, prompt="sks cat at night")]
    assert_close(latents_of(composer, concepts=concepts, method=QUIET), latents_of(plain_tiny, "sks cat at night"))


@pytest.mark.parametrize("change", [{"prompt": "sks at night"}, {"weight": 0.3}], ids=["prompt", "weight"])
def test_what_a_region_reads_reaches_no_other_cell_of_the_layer(composer, change):
    boxes = {"cat": (0, 0, 64, 64), "dog": (64, 64, 128, 128)}
    outputs: list[Tensor] = []
    layer = composer.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for cat in ({}, change):
        concepts = [Concept(name="cat", region=boxes["cat"], **cat), Concept(name="dog", region=boxes["dog"])]
        latents_of(composer, concepts=concepts, method=LoraComposer(inject="attn2", step_size=0, apart=0))
    changed = (outputs[0] != outputs[2]).any(dim=-1).any(dim=0).unflatten(0, (16, 16))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:8, :8] = True
    assert torch.equal(changed, inside)


def test_every_region_has_the_text_and_the_lora_of_its_concept(tiny, load):
    for name in ("cat", "dog", "style"):
        load(tiny, name, text=True)
    concepts = [
        Concept(name="style", weight=0.5),
        Concept(name="dog", region=(64, 64, 128, 128), weight=2.0),
        Concept(name="cat", region=(0, 0, 64, 64), weight=3.0),
    ]
    gates = {}
    for inject in ("full", "attn2"):
        method = Seen(inject=inject, step_size=0, apart=0)
        latents_of(tiny, concepts=concepts, method=method, num_inference_steps=1)
        gates[inject] = method.processes[0].gates
    text, image, read = gates["full"].text, gates["full"].image[0], gates["full"].read[0]
    assert text[:, 1].squeeze(1).tolist() == [[0.5, 0, 0], [0, 2, 0], [0, 0, 3]]
    for gate in (text, *gates["full"].image.values(), *gates["full"].read.values()):
        assert gate[..., 0, :, :].abs().max() == 0, "the negative prompt's rows"
    dog, cat, grass = 16 * 15 + 15, 0, 15
    assert [image[1, cell].tolist() for cell in (dog, cat, grass)] == [[0.5, 2, 0], [0.5, 0, 3], [0.5, 0, 0]]
    assert [read[1, cell].tolist() for cell in (dog, cat, grass)] == [[0, 2, 0], [0, 0, 3], [0.5, 0, 0]]
    assert torch.equal(gates["attn2"].text, text)
    assert torch.equal(gates["attn2"].read[0], read)
    assert gates["attn2"].image[0][1].unique(dim=0).tolist() == [[0.5, 0, 0]]


def test_the_background_concept_changes_the_text_of_the_background_alone(tiny, load):
    for name in ("cat", "dog", "style"):
        load(tiny, name, text=True)
    texts, images = [], []
    for weight in (0.0, 1.0):
        method = Seen(step_size=0, apart=0)
        boxes = [Concept(name="cat", region=(0, 0, 64, 64)), Concept(name="dog", region=(64, 64, 128, 128))]
        images.append(latents_of(tiny, concepts=[*boxes, Concept(name="style", weight=weight)], method=method))
        texts.append(method.processes[0].conditioning.prompt_embeds)
    assert far_apart(texts[0][0], texts[1][0])
    assert torch.equal(texts[0][1:], texts[1][1:])
    assert far_apart(*images)


def test_where_regions_overlap_loras_act_in_equal_parts(composer):
    method = Seen(step_size=0, apart=0)
    boxes = [Concept(name="cat", region=(0, 0, 96, 128)), Concept(name="dog", region=(32, 0, 128, 128))]
    latents_of(composer, concepts=boxes, method=method, num_inference_steps=1)
    gate = method.processes[0].gates.image[0][1].unflatten(0, (16, 16))
    assert gate[3, [0, 8, 15]].tolist() == [[1, 0], [0.5, 0.5], [0, 1]]


@pytest.mark.parametrize(("threshold", "columns"), [(1.0, 8), (0.6, 8), (0.5, 9), (0.0, 9)])
def test_cells_belong_to_a_region_from_a_share_on(composer, threshold, columns):
    method = Seen(step_size=0, apart=0, threshold=threshold)
    concepts = [Concept(name="cat", region=(0, 0, 68, 128)), Concept(name="dog", region=(80, 0, 128, 128))]
    latents_of(composer, concepts=concepts, method=method, num_inference_steps=1)
    cat = method.processes[0].gates.image[0][1, :, 0].unflatten(0, (16, 16))
    assert cat[5].tolist() == [1] * columns + [0] * (16 - columns)


def test_two_names_of_a_concept_on_one_box_are_as_one(composer):
    file = composer.concepts["cat"].lora
    cat = Concept(name="cat", region=LEFT, prompt="a sks cat at night")
    twin = Concept(name="twin", lora=file, region=LEFT, prompt="a sks cat at night")
    one, two = (
        latents_of(composer, "a zwx dog on grass", concepts=[*cats, Concept(name="dog", region=RIGHT)], method=QUIET)
        for cats in ([cat], [cat, twin])
    )
    assert_close(one, two)


@pytest.mark.parametrize("method", [
    LoraComposer(), LoraComposer(reinit="copy", rows="all"),
], ids=["default", "copy"])  # fmt: skip
def test_the_order_of_concepts_does_not_matter(tiny, load, method):
    for name in ("cat", "dog", "style"):
        load(tiny, name)
    cat = Concept(name="cat", region=(0, 0, 64, 128), prompt="sks cat in the water")
    dog = Concept(name="dog", region=(64, 32, 128, 128), prompt="there is one big zwx dog on grass")
    style = Concept(name="style")
    one, *others = (
        latents_of(tiny, concepts=concepts, method=method, num_inference_steps=4)
        for concepts in ([cat, dog, style], [dog, cat, style], [style, dog, cat])
    )
    for other in others:
        assert_close(one, other)


# Texts


def test_a_concepts_own_prompts_reach_the_text_of_its_region_alone(composer, plain_tiny):
    method = Seen(step_size=0, apart=0)
    concepts = side_by_side(prompt="a sks cat at night", negative_prompt="bright")
    latents_of(composer, concepts=concepts, method=method, negative_prompt="dark")
    conditioning = method.processes[0].conditioning
    texts = [("on grass", "dark"), ("a sks cat at night", "bright"), ("a zwx dog on grass", "dark")]
    for found, (prompt, negative) in zip(conditioning.prompt_embeds, texts, strict=True):
        cond, uncond = plain_tiny.encode_prompt(prompt, "cpu", 1, True, negative)
        assert_close(found, torch.cat([uncond, cond]))


def test_every_prompt_of_a_call_has_regional_texts_of_its_own(composer, plain_tiny):
    method = Seen(step_size=0, apart=0, background="scene")
    prompts = ["a sks cat and a zwx dog on grass", "the zwx dog with the sks cat in the water"]
    latents_of(composer, prompts, concepts=side_by_side(), method=method, num_images_per_prompt=2, guidance_scale=1)
    found = method.processes[0].conditioning.prompt_embeds
    texts = [
        ["a cat and a dog on grass", "the dog with the cat in the water"],
        ["a sks cat on grass", "the sks cat in the water"],
        ["a zwx dog on grass", "the zwx dog in the water"],
    ]
    for text, expected in zip(found, texts, strict=True):
        assert_close(text, plain_tiny.encode_prompt(expected, "cpu", 2, False)[0])
