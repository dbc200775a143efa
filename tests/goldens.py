"""Runs whose latents must not change by accident: every method, and what else changes what is computed.

    PYTHONPATH=tests python -m goldens make before.pt       # all of them, whole, of the code as it is
    PYTHONPATH=tests python -m goldens compare before.pt    # bit for bit: on the same machine with the same libraries
    PYTHONPATH=tests python -m goldens record               # some numbers of each, which test_goldens.py compares

Only the public interface is used, so that what is behind it may change.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    T2IAdapter,
)
from torch import Tensor

from components import FAMILIES, activated
from golden import BOXES, LEFT, PROMPT, RIGHT, WIDE, Golden, boxed, mask_file, squares
from lora_compose import Concept, Control
from transformer_goldens import transformer_goldens

RECORDED = Path(__file__).parent / "fixtures" / "goldens.json"


def controlnet_by_region(pipe: Any) -> Control:
    """A ControlNet with a scale of its own in one region."""
    return replace(controlnet(pipe), regions={"dog": 0.2})


def controlnet(pipe: Any) -> Control:
    """A ControlNet of the pipeline's UNet."""
    torch.manual_seed(1)
    net: Any = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    return Control(model=activated(net, size=0.2, seed=5), image=squares(), scale=0.8)


def t2i_adapter(pipe: Any) -> Control:
    """A T2I-Adapter for the pipeline's UNet."""
    torch.manual_seed(1)
    channels = list(pipe.unet.config.block_out_channels)
    net: Any = T2IAdapter(channels=channels, adapter_type="full_adapter", downscale_factor=8, num_res_blocks=1)
    return Control(model=net.eval(), image=squares())


def _masked() -> dict[str, dict[str, Any]]:
    return {"cat": {"region": LEFT}, "dog": {"region": mask_file()}}


def _by_family() -> dict[str, Golden]:
    """What every family does."""
    found = {}
    for family in FAMILIES:
        runs = {
            "merge": Golden(family, "merge", cheap=True),
            "tara": Golden(family, "tara", cheap=True),
            "tara official": Golden(family, "tara:official"),
            "tara keys and values": Golden(family, "tara", {"scope": "cross_kv"}),
            "regional": Golden(family, "regional", fields=boxed(), cheap=True),
            "regional with masks": Golden(family, "regional", {"token_mask": "all"}, fields=boxed()),
            "switch": Golden(family, "switch", {"interval": 1}),
            "composite": Golden(family, "composite", cheap=True),
            "composite unequal": Golden(family, "composite", {"shares": (1.0, 2.0)}),
            "lora-composer": Golden(family, "lora-composer", fields=boxed(), cheap=True),
            "lora-composer official": Golden(family, "lora-composer:official", fields=boxed()),
            "lora-composer paper": Golden(family, "lora-composer:paper", fields=boxed()),
            "clora": Golden(family, "clora", cheap=True),
            "clora official": Golden(family, "clora:official", {"refinements": 1}),
            "clora branches": Golden(family, "clora", {"fuse": "branches"}),
            "clora branches in turn": Golden(family, "clora", {"fuse": "branches", "branch_batch_size": 1}),
            "draft": Golden(family, "draft", cheap=True),
            "freefuse": Golden(family, "freefuse", cheap=True),
            "default": Golden(family, None),
        }
        found |= {f"{family}: {name}": run for name, run in runs.items()}
    return found


def _sd() -> dict[str, Golden]:
    """What does not depend on the family, on the smaller one."""
    three: Any = {"cat": {}, "dog": {}, "bear": {}}
    sets = {
        "prompt": [PROMPT, "in snow, a xlo bear", "a tree"],
        "concepts": [["cat", Concept(name="dog", weight=0.6)], ["bear"], []],
    }
    boxed_sets = {
        "prompt": [PROMPT, "a xlo bear in snow"],
        "concepts": [
            [Concept(name=name, region=box) for name, box in BOXES.items()],
            [Concept(name="bear", region=WIDE)],
        ],
    }
    own = {
        "cat": {"region": LEFT, "prompt": "a sks cat with a hat", "negative_prompt": "blurry"},
        "dog": {"region": RIGHT, "prompt": "a zwx dog in snow"},
    }
    branches = {
        "cat": {"prompt": "a sks cat with a hat and a dog", "negative_prompt": "blurry"},
        "dog": {"prompt": "a cat and a zwx dog in snow"},
    }
    odd = {"height": 136, "width": 152}
    runs = {
        "without concepts": Golden("sd", None, fields={}, cheap=True),
        "one concept": Golden("sd", "merge", fields={"cat": {}}),
        "three": Golden("sd", "clora", fields=three, arguments={"prompt": f"{PROMPT} beside a xlo bear"}),
        "mask image": Golden("sd", "regional", fields=_masked(), cheap=True),
        "mask image, lora-composer": Golden("sd", "lora-composer", fields=_masked()),
        "overlapping boxes": Golden(
            "sd", "lora-composer", fields={"cat": {"region": LEFT}, "dog": {"region": WIDE}, "bear": {"region": RIGHT}},
            arguments={"prompt": f"{PROMPT} beside a xlo bear"},
        ),
        "LoHa and LoKr": Golden("sd", "tara", fields={"loha": {}, "lokr": {}}, cheap=True),
        "difference and DoRA": Golden(
            "sd", "regional", fields={"difference": {"region": RIGHT}, "dora": {"region": LEFT}}, cheap=True
        ),
        "OFT and T-LoRA": Golden("sd", "merge", fields={"oft": {}, "t-lora": {}}, cheap=True),
        "style": Golden("sd", "tara", fields={"cat": {}, "dog": {}, "style": {"role": "style"}}),
        "style, clora": Golden("sd", "clora", fields={"cat": {}, "dog": {}, "style": {"role": "style"}}),
        "weight schedule": Golden("sd", "merge", fields={"cat": {"weight": "0:1..0.5:0.2"}, "dog": {"weight": [1, 0]}}),
        "weight schedule, clora": Golden("sd", "clora", fields={"cat": {"weight": "1..0.4"}, "dog": {}}, cheap=True),
        "blocks": Golden("sd", "regional", fields=boxed(blocks={"down": 0.5, "up.1": 0.0, "text": 0.3})),
        "own prompts": Golden("sd", "lora-composer", fields=own, cheap=True),
        "own prompts, clora": Golden("sd", "clora", {"fuse": "branches", "uncond": "each"}, fields=branches),
        "controlnet": Golden(
            "sd", "lora-composer", fields=boxed(), arguments={"control": controlnet_by_region}, cheap=True
        ),
        "controlnet, clora": Golden("sd", "clora", arguments={"control": controlnet}),
        "t2i-adapter": Golden("sd", "regional", fields=boxed(), arguments={"control": t2i_adapter}),
        "two of one class, draft": Golden(
            "sd", "draft", fields={"cat": {}, "bear": {"class_word": "cat"}},
            arguments={"prompt": "a sks cat and a xlo cat in snow", "num_images_per_prompt": 2},
        ),
        "a region for one, draft": Golden("sd", "draft", {"length": 0.5}, fields={"cat": {"region": LEFT}, "dog": {}}),
        "concept sets": Golden("sd", "merge", arguments=sets, cheap=True),
        "concept sets, tara": Golden("sd", "tara", arguments=sets),
        "concept sets, clora": Golden("sd", "clora", arguments=sets),
        "concept sets, lora-composer": Golden("sd", "lora-composer", arguments=boxed_sets),
        "two images": Golden("sd", "clora", arguments={"num_images_per_prompt": 2}),
        "two images, lora-composer": Golden("sd", "lora-composer", fields=boxed(),
                                            arguments={"num_images_per_prompt": 2}),
        "one step": Golden("sd", "clora", arguments={"num_inference_steps": 1}, cheap=True),
        "one step, lora-composer": Golden("sd", "lora-composer", fields=boxed(), arguments={"num_inference_steps": 1}),
        "eight steps": Golden("sd", "lora-composer", fields=boxed(), arguments={"num_inference_steps": 8}),
        "guidance 0": Golden("sd", "clora", arguments={"guidance_scale": 0.0}),
        "guidance 1": Golden("sd", "lora-composer", fields=boxed(), arguments={"guidance_scale": 1.0}, cheap=True),
        "guidance 1, branches": Golden("sd", "clora", {"fuse": "branches"}, arguments={"guidance_scale": 1.0}),
        "guidance rescaled": Golden("sd", "tara", arguments={"guidance_rescale": 0.7}),
        "negative prompt": Golden("sd", "lora-composer", fields=boxed(), arguments={"negative_prompt": "a dog"}),
        "Heun": Golden("sd", "clora", scheduler=HeunDiscreteScheduler, cheap=True),
        "Heun, lora-composer": Golden("sd", "lora-composer", fields=boxed(), scheduler=HeunDiscreteScheduler),
        "Euler": Golden("sd", "lora-composer", fields=boxed(), scheduler=EulerDiscreteScheduler),
        "Euler ancestral": Golden("sd", "clora", scheduler=EulerAncestralDiscreteScheduler),
        "DPM++": Golden("sd", "clora", {"fuse": "branches"}, scheduler=DPMSolverMultistepScheduler),
        "LCM": Golden("sd", "lora-composer", fields=boxed(), scheduler=LCMScheduler),
        "eta": Golden("sd", "regional", fields=boxed(), arguments={"eta": 0.5}),
        "odd canvas": Golden("sd", "lora-composer", fields=boxed(), arguments=odd, cheap=True),
        "odd canvas, clora": Golden("sd", "clora", arguments={"height": 136, "width": 120}),
        "other settings, clora": Golden(
            "sd", "clora", {"isolate": True, "smoothed": True, "morphology": ("open", "dilate"), "refine_at": (0.25,),
                            "refinements": 2, "step_rule": "raw", "exclusive": False},
        ),
        "other settings, lora-composer": Golden("sd", "lora-composer", {"isolate": False, "apart": 0.0},
                                                fields=boxed()),
    }  # fmt: skip
    return {f"sd: {name}": run for name, run in runs.items()}


def _from_images() -> dict[str, Golden]:
    """Image-to-image and inpainting on UNets."""
    found = {}
    for family in FAMILIES:
        start: dict[str, Any] = {"image": squares(), "strength": 0.6}
        inside = {"cat": (32, 32, 80, 112), "dog": (80, 32, 128, 112)}
        found[f"{family}: image-to-image"] = Golden(family, "draft", arguments=start)
        found[f"{family}: inpainting"] = Golden(
            family, "regional", fields={name: {"region": box} for name, box in inside.items()},
            arguments={**start, "mask_image": (32, 32, 128, 112)}, cheap=family == "sd",
        )  # fmt: skip
    return found


def _others() -> dict[str, Golden]:
    """What SDXL alone has, and the trained model."""
    sizes = {"original_size": (100, 120), "crops_coords_top_left": (4, 8), "target_size": (128, 96)}
    cats = {f"{name}-tara": {} for name in BOXES}
    return {
        "sdxl: sizes": Golden("sdxl", "tara", arguments=sizes),
        "sdxl: ends early": Golden("sdxl", "regional", fields=boxed(), arguments={"denoising_end": 0.6}),
        "sdxl: controlnet": Golden("sdxl", "regional", fields=boxed(), arguments={"control": controlnet}),
        "sdxl: Euler": Golden("sdxl", "clora", scheduler=EulerDiscreteScheduler),
        "playground: merge": Golden("playground", "merge"),
        "playground: tara": Golden("playground", "tara", fields=cats),
        "playground: regional": Golden("playground", "regional", fields=boxed()),
        "playground: lora-composer": Golden("playground", "lora-composer", fields=boxed()),
        "playground: clora": Golden("playground", "clora"),
        "playground: draft": Golden("playground", "draft", arguments={"num_inference_steps": 8}),
        "playground: freefuse": Golden("playground", "freefuse", {"words": "phrase", "rows": "cond_only"}),
        "playground: clora official": Golden("playground", "clora:official", {"refinements": 2}),
    }


GOLDENS: Mapping[str, Golden] = {**_by_family(), **_sd(), **_from_images(), **_others(), **transformer_goldens()}
"""All runs, by name."""


def numbers(latents: Tensor) -> list[float]:
    """Some numbers of latents, from all over them, and their mean and standard deviation."""
    flat = latents.flatten().double()
    some = flat[:: max(1, len(flat) // 12)][:12]
    return [round(float(value), 6) for value in (*some, flat.mean(), flat.std())]


def main(verb: str, path: str = "") -> None:
    """Makes, compares or records them."""
    torch.set_num_threads(1)
    made = {}
    before = torch.load(path) if verb == "compare" else {}
    apart = 0
    for name, golden in GOLDENS.items():
        made[name] = golden.latents()
        if verb == "compare":
            same = name in before and torch.equal(before[name], made[name])
            apart += not same
            if not same:
                off = (before[name] - made[name]).abs().max() if name in before else "new"
                sys.stdout.write(f"{name}: {off}\n")
    if verb == "make":
        torch.save(made, path)
    elif verb == "record":
        cheap = {name: numbers(latents) for name, latents in made.items() if GOLDENS[name].cheap}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in cheap.items())
        RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    differ = f", {apart} differ" if verb == "compare" else ""
    sys.stdout.write(f"{len(made)} runs{differ}; {time.process_time():.0f} CPU seconds\n")
    raise SystemExit(bool(apart))


if __name__ == "__main__":
    main(*sys.argv[1:])
