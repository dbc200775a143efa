"""Golden runs of transformers: every method that runs on them, and what else changes what is computed."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from all_transformers import EVERY, FEW, JOINT, TRANSFORMERS
from components import seeded
from golden import BOXES, LEFT, PROMPT, RIGHT, Golden, boxed, mask_file, squares
from lora_compose import Concept
from qwen_image_edit import NAVY, ORANGE

PROMPTS = [PROMPT, "in the photo, a zwx dog", "a dog on grass"]
SETS: dict[str, Any] = {"prompt": PROMPTS, "concepts": [["cat", Concept(name="dog", weight=0.6)], ["dog"], []]}
BOXED_SETS: dict[str, Any] = {
    "prompt": PROMPTS[:2],
    "concepts": [
        [Concept(name=name, region=box) for name, box in BOXES.items()],
        [Concept(name="dog", region=LEFT)],
    ],
}


def transformer_goldens() -> dict[str, Golden]:
    """All of them, by name."""
    return {**_by_family(), **_flux(), **_from_images(), **_with_references(), **_freefuse()}


def _by_family() -> dict[str, Golden]:
    """What every family does, with and without unconditional rows."""
    found = {}
    for family, described in TRANSFORMERS.items():
        guided = dict(described.guided)
        runs = {
            "without concepts": Golden(family, None, fields={}, arguments=guided),
            "merge": Golden(family, "merge", arguments=guided),
            "merge unguided": Golden(family, "merge", cheap=True),
            "tara": Golden(family, "tara", arguments=guided),
            "tara unguided": Golden(family, "tara"),
            "regional": Golden(family, "regional", fields=boxed(), arguments=guided, cheap=True),
            "regional unguided": Golden(family, "regional", fields=boxed()),
            "regional with one text": Golden(
                family,
                "regional",
                {"token_mask": "none", "texts": "shared", "isolate": 0.0},
                fields=boxed(),
                arguments=guided,
            ),
            "switch": Golden(family, "switch", {"interval": 1}, arguments=guided),
            "composite": Golden(family, "composite", {"shares": (1.0, 2.0)}, arguments=guided),
            "draft": Golden(family, "draft", arguments=guided, cheap=True),
            "draft unguided": Golden(family, "draft"),
            "clora branches": Golden(family, "clora", {"fuse": "branches"}, arguments=guided),
            "clora branches in turn": Golden(
                family, "clora", {"fuse": "branches", "branch_batch_size": 1}, arguments=guided
            ),
            "default": Golden(family, None),
            "concept sets": Golden(family, "merge", arguments={**guided, **SETS}),
            "concept sets unguided": Golden(family, "tara", arguments=SETS),
            "concept sets, regional": Golden(family, "regional", arguments={**guided, **BOXED_SETS}),
            "two images, draft": Golden(family, "draft", arguments={**guided, "num_images_per_prompt": 2}),
            "one step": Golden(family, "regional", fields=boxed(), arguments={**guided, "num_inference_steps": 1}),
        }
        if family in JOINT:
            runs["regional with texts of regions"] = Golden(
                family, "regional", {"texts": "regions", "isolate": 0.0}, fields=boxed(), arguments=guided, cheap=True
            )
        found |= {f"{family}: {name}": run for name, run in runs.items()}
    return found


def _flux() -> dict[str, Golden]:
    """What does not depend on the family, and what FLUX.1 alone has."""
    guided = dict(TRANSFORMERS["flux"].guided)
    own = {
        "cat": {"region": LEFT, "prompt": "a sks cat in the photo", "negative_prompt": "grass"},
        "dog": {"region": RIGHT, "prompt": "a zwx dog in grass"},
    }
    branches = {
        "cat": {"prompt": "a sks cat in the photo and a dog", "negative_prompt": "grass"},
        "dog": {"prompt": "a cat and a zwx dog in grass"},
    }
    each = {"fuse": "branches", "uncond": "each"}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    unipc = SimpleNamespace(from_config=partial(UniPCMultistepScheduler.from_config, **flow))
    one = {"cat": {"region": LEFT}, "dog": {}}
    masked = {"cat": {"region": LEFT}, "dog": {"region": mask_file()}}
    runs = {
        "distilled guidance": Golden("flux", "draft", arguments={"guidance_scale": 1.5}),
        "both texts": Golden(
            "flux", "tara", arguments={**guided, "prompt_2": f"{PROMPT} in the photo", "negative_prompt_2": "a cat"}
        ),
        "noise is given": Golden("flux", "merge", arguments={"latents": _noise}),
        "weights in the prompt": Golden("flux", "merge", arguments={"prompt": "a sks cat, a zwx dog, (grass:1.4)"}),
        "mask image": Golden("flux", "regional", fields=masked, arguments=guided),
        "style": Golden("flux", "draft", fields={"cat": {}, "dog": {}, "style": {"role": "style"}}, arguments=guided),
        "style, regional": Golden("flux", "regional", fields={**boxed(), "style": {"role": "style"}}),
        "weight schedule": Golden("flux", "merge", fields={"cat": {"weight": "0:1..0.5:0.2"}, "dog": {}}),
        "own prompts": Golden("flux", "regional", fields=own, arguments=guided),
        "own prompts, clora": Golden("flux", "clora", each, fields=branches, arguments=guided),
        "LoHa and DoRA, regional": Golden(
            "flux", "regional", fields={"dora": {"region": RIGHT}, "loha": {"region": LEFT}}, cheap=True
        ),
        "OFT and T-LoRA": Golden("flux", "tara", fields={"oft": {}, "t-lora": {}}, arguments=guided),
        "LoKr": Golden("flux", "tara", fields={"kron": {}, "dog": {}}, arguments=guided),
        "LoKr, regional": Golden("flux", "regional", fields={"kron": {"region": LEFT}, "dog": {"region": RIGHT}}),
        "a region for one, draft": Golden("flux", "draft", {"length": 0.5}, fields=one),
        "odd canvas": Golden("flux", "regional", fields=boxed(), arguments={**guided, "height": 144, "width": 128}),
        "sigmas": Golden("flux", "draft", arguments={"sigmas": [1.0, 0.8, 0.4, 0.1]}),
        "UniPC": Golden("flux", "draft", arguments=guided, scheduler=unipc),
    }  # fmt: skip
    return {f"flux: {name}": run for name, run in runs.items()}


def _from_images() -> dict[str, Golden]:
    """Image-to-image and inpainting, where a family has them."""
    found = {}
    for family, described in TRANSFORMERS.items():
        for inpaints in described.image_tasks:
            start: dict[str, Any] = {"image": squares(), "strength": 0.6, **described.guided}
            start |= {"mask_image": (32, 32, 128, 112)} if inpaints else {}
            name = f"{family}: {'inpainting' if inpaints else 'image-to-image'}"
            found[name] = Golden(family, "draft", arguments=start, cheap=family == "flux")
            found[f"{name}, regional"] = Golden(family, "regional", fields=boxed(), arguments=start)
    return found


def _with_references() -> dict[str, Golden]:
    """Reference images: LoRAs act in the cells of the image alone, or on the references, too."""
    both = [NAVY, ORANGE]
    acting = {name: {"region": box, "references": name == "dog"} for name, box in BOXES.items()}
    runs = {
        "flux2": Golden("flux2", "regional", fields=boxed(), arguments={"image": both}, cheap=True),
        "flux2, acting on them": Golden("flux2", "regional", fields=acting, arguments={"image": both}),
        "flux2-dev": Golden("flux2-dev", "merge", arguments={"image": both}),
        "flux3": Golden("flux3", "regional", fields=boxed(), arguments={**_guided("flux3"), "image": both}),
        "kontext": Golden("kontext", "draft", arguments={"image": NAVY, "_auto_resize": False}, cheap=True),
        "qwen-image-edit": Golden("qwen-image-edit", "regional", fields=boxed(), arguments=_guided("qwen-image-edit")),
        "qwen-image-edit-2511": Golden(
            "qwen-image-edit-2511", "draft", arguments=_guided("qwen-image-edit-2511"), cheap=True
        ),
    }
    return {f"references: {name}": run for name, run in runs.items()}


def _freefuse() -> dict[str, Golden]:
    """FreeFuse, which looks at the outputs of attention, on families that have these in different ways."""
    runs = {name: Golden(name, "freefuse", arguments=_guided(name), cheap=name == "z-image") for name in FEW}
    official = Golden("flux", "freefuse:official-flux", {"length": 2})
    return {**{f"{name}: freefuse": run for name, run in runs.items()}, "flux: freefuse official": official}


def _guided(family: str) -> dict[str, Any]:
    return dict(EVERY[family].guided)


def _noise(pipe: Any) -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=seeded(1))
