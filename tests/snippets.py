"""Python of README and docs, and folders of small models under the names that it opens (`ModelFolders`)."""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file

from anima import anima_pipeline
from checkpoints import write_checkpoint, write_gguf
from chroma import chroma_pipeline
from components import (
    TINY,
    TINY_XL,
    kohya_tensors,
    lora_tensors,
    random_lora,
    sd_unet,
    sdxl_unet,
    small_pipeline,
    small_vae,
    text_loras,
    xl_pipeline,
)
from flux import flux_pipeline
from flux2 import default_klein, flux2_vae
from flux3 import default_flux3
from ideogram4 import ideogram4_pipeline
from ip_adapters import image_encoder, ip_adapter
from lora_compose.pipelines.families.flux_kontext import ComposeFluxKontextPipeline
from qwen_image import qwen_image_pipeline, qwen_image_vae
from qwen_image_edit import qwen_image_edit_pipeline
from simulated_device import DEVICE, parameters_that_move
from z_image import z_image_pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "assets").rglob("*.md")],
    key=lambda path: path.as_posix(),
)
CODE_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
STEPS = 2
CHARACTERS = (("miku", "hatsune miku", "aqua twintails"), ("rin", "kagamine rin", "white hair ribbon"))
"""Names of files, and the tags that all captions of their images have."""


def name_of(page: Path) -> str:
    """The page as people name it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *kinds: str) -> list[str]:
    """The code of these kinds on a page, in order."""
    return [dedent(code) for kind, code in CODE_BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def typed(page: Path) -> list[list[str]]:
    """The commands of ours in the code of a page, as lists of words."""
    code = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    windows = "\n".join(blocks(page, "powershell")).replace("`\n", " ").replace("\\", "/").replace("/Scripts/", "/bin/")
    lines = f"{code}\n{windows}".splitlines()
    found = [line for line in lines if re.match(r"\s*(\.venv/bin/)?lora-compose ", line)]
    return [shlex.split(line, comments=True)[1:] for line in found]


def named(page: Path) -> list[list[str]]:
    """The commands of ours in the text and the tables of a page; some leave out what does not matter there."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8")).replace("\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"`(lora-compose [^`]+)`", text)]


def _deep_vae(size: int, **changes: Any) -> Any:
    """32 pixels per latent cell and side, so that images have the size of the large model's and few cells."""
    deep = {
        "block_out_channels": (4,) * 6, "down_block_types": ("DownEncoderBlock2D",) * 6,
        "up_block_types": ("UpDecoderBlock2D",) * 6, "norm_num_groups": 2, "layers_per_block": 1, "sample_size": size,
    }  # fmt: skip
    return small_vae(**deep | changes)


def _stable_diffusion() -> Any:
    pipe = small_pipeline(unet=sd_unet(**TINY))
    pipe.register_modules(vae=_deep_vae(512))
    return pipe


def _sdxl() -> Any:
    pipe = xl_pipeline(unet=sdxl_unet(**TINY_XL, sample_size=32))
    pipe.register_modules(vae=_deep_vae(1024))
    return pipe


def _with_deep_vae(pipe: Any) -> Any:
    pipe.register_modules(vae=_deep_vae(1024, shift_factor=0.1))
    return pipe


def _flux2() -> Any:
    pipe = default_klein()
    pipe.register_modules(vae=flux2_vae(6, 1024))
    return pipe


def _ideogram4() -> Any:
    pipe = ideogram4_pipeline()
    pipe.register_modules(vae=flux2_vae(7, 2048))
    return pipe


def _qwen_image(make: Callable[[], Any]) -> Any:
    pipe = make()
    pipe.register_modules(vae=qwen_image_vae(6, 1024))
    return pipe


@dataclass(frozen=True)
class Published:
    """A model that the docs name.

    Attributes:
        family: Of its LoRAs.
        make: Makes a small model of random weights with its structure.
    """

    family: str
    make: Callable[[], Any]


PUBLISHED: Mapping[str, Published] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published("sd", _stable_diffusion),
    "stabilityai/stable-diffusion-xl-base-1.0": Published("sdxl", _sdxl),
    "black-forest-labs/FLUX.1-dev": Published("flux", lambda: _with_deep_vae(flux_pipeline())),
    "black-forest-labs/FLUX.1-Kontext-dev": Published(
        "kontext", lambda: _with_deep_vae(flux_pipeline(ComposeFluxKontextPipeline))
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": Published("flux2", _flux2),
    "lodestones/Chroma1-HD": Published("chroma", lambda: _with_deep_vae(chroma_pipeline())),
    "ideogram-ai/ideogram-v4": Published("ideogram4", _ideogram4),
    "Qwen/Qwen-Image": Published("qwen-image", lambda: _qwen_image(qwen_image_pipeline)),
    "Qwen/Qwen-Image-Edit-2511": Published("qwen-image-edit", lambda: _qwen_image(qwen_image_edit_pipeline)),
    "Tongyi-MAI/Z-Image": Published("z-image", lambda: _with_deep_vae(z_image_pipeline())),
    "path/to/flux3": Published("flux3", default_flux3),
    "path/to/anima": Published("anima", lambda: anima_pipeline(max_size=(4, 128, 128))),
}


class ModelFolders:
    """A folder for each family, in which the names that the docs use lead to small models, LoRAs and images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Any] = {}

    def folder(self, family: str) -> Path:
        """Where code that uses models and LoRAs of a family is run."""
        folder = self.root / family
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "assets").symlink_to(ROOT / "assets")
            for name, published in PUBLISHED.items():
                if published.family == family:
                    self._fill(folder, name, published)
        return folder

    def _fill(self, folder: Path, name: str, published: Published) -> None:
        pipe = published.make()
        pipe.save_pretrained(folder / name)
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        (folder / "loras").mkdir()
        for seed, concept in enumerate(("cat", "dog", "bear", "ink")):
            lora = random_lora(pipe.components[part], seed, size=0.05)
            words = {"trigger": ("sks", "zwx", "xlo", "ink")[seed], "class_word": concept} if concept != "ink" else {}
            for place in (folder, folder / "loras"):
                save_file(lora_tensors(**{part: lora}), place / f"{concept}.safetensors", metadata=words)
        for seed, concept in enumerate(("alice", "berta", "duo"), 4):  # files that say nothing of their words
            lora = random_lora(pipe.components[part], seed, size=0.05)
            save_file(lora_tensors(**{part: lora}), folder / f"{concept}.safetensors")
        for seed, image in enumerate(("pose", "look", "start", "room", "chair")):
            pixels = np.random.default_rng(seed).random((512, 512, 3)) * 255
            picture = Image.fromarray(pixels.astype("u1"))
            picture.save(folder / f"{image}.png", compress_level=0)  # noise gets no smaller
        for number, mask in enumerate(("cat", "dog")):
            half = np.zeros((512, 512), "u1")
            half[:, 256 * number : 256 * (number + 1)] = 255
            Image.fromarray(half).save(folder / f"{mask}.png")
        if published.family == "sd":
            self._fill_control(folder, pipe)
            self._fill_words(folder, pipe)
        if published.family == "flux" and importlib.util.find_spec("gguf"):
            write_gguf(pipe.transformer.state_dict(), folder / "flux1-dev-Q4_K_S.gguf")
        if published.family == "sdxl":
            self._fill_characters(folder, pipe)
            single = small_pipeline()
            single.save_pretrained(folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")  # its configuration
            write_checkpoint(single, folder / "checkpoint.safetensors")
            save_file(
                lora_tensors(unet=random_lora(pipe.unet, 9, size=0.02)),
                _folder(folder / "latent-consistency/lcm-lora-sdxl") / "pytorch_lora_weights.safetensors",
            )

    def _fill_characters(self, folder: Path, pipe: Any) -> None:
        """Two files as kohya's scripts write them, whose captions are booru tags."""
        for seed, (name, *tags) in enumerate(CHARACTERS, 10):
            lora = {"unet": random_lora(pipe.unet, seed, size=0.05), **text_loras(pipe, seed, size=0.05)}
            counts = {tag: 40 - number for number, tag in enumerate((*tags, "1girl", "solo", "smile"))}
            metadata = {
                "ss_tag_frequency": json.dumps({f"10_{name}": counts}), "ss_network_module": "networks.lora",
                "ss_base_model_version": "sdxl_base_v1-0",
            }  # fmt: skip
            save_file(kohya_tensors(**lora), folder / f"{name}.safetensors", metadata=metadata)

    def _fill_words(self, folder: Path, pipe: Any) -> None:
        layers = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
        width = pipe.text_encoder.config.hidden_size
        words = {f"<potter{i}>": torch.randn(len(layers), width) for i in (1, 2)}
        lora = {
            f"{layer}_lora.{side}.weight": tensor
            for layer, factors in random_lora(pipe.unet, 5).items()
            for side, tensor in (("down", factors.down), ("up", factors.up))
        }
        torch.save(
            {"params": {"new_concept_embedding": words, "text_encoder": {}, "unet": lora}}, folder / "potter.pth"
        )
        factors = lora_tensors(unet=random_lora(pipe.unet, 6))
        save_file({key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
                   for key, tensor in factors.items()}, folder / "unet.safetensors")  # fmt: skip

    def _fill_control(self, folder: Path, pipe: Any) -> None:
        pose = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
        config: dict[str, Any] = dict(pose.config) | {"conditioning_embedding_out_channels": (4,) * 6}
        ControlNetModel(**config).save_pretrained(folder / "lllyasviel/control_v11p_sd15_openpose")
        models = _folder(folder / "h94/IP-Adapter/models")
        image_encoder().save_pretrained(models / "image_encoder")
        tensors = {
            f"{part}.{key}": tensor for part, found in ip_adapter(pipe.unet).items() for key, tensor in found.items()
        }
        save_file(tensors, models / "ip-adapter_sd15.safetensors")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


class _Cheaper(ast.NodeTransformer):
    """Rewrites code to few steps, and to the simulated device where it names a GPU.

    Without a GPU, code is run without offloading if `moves` is off.
    """

    def __init__(self, steps: int | None, *, moves: bool) -> None:
        self.steps, self.moves = steps, moves

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        found = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
        if found and "offload" in ast.unparse(node.value) and not self.moves and not torch.cuda.is_available():
            return None
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(str(DEVICE)) if node.value == "cuda" and not torch.cuda.is_available() else node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        self.generic_visit(node)
        for i, key in enumerate(node.keys):
            if isinstance(key, ast.Constant) and key.value == "num_inference_steps" and self.steps:
                node.values[i] = ast.Constant(self.steps)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("enable_model_cpu_offload", "enable_sequential_cpu_offload") and not torch.cuda.is_available():
            node.keywords.append(ast.keyword("device", ast.Constant(str(DEVICE))))
        names = [keyword.arg for keyword in node.keywords]
        if self.steps and called in ("pipe", "refine") and None not in names:
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "num_inference_steps"]
            node.keywords.append(ast.keyword("num_inference_steps", ast.Constant(self.steps)))
        if called == "preset":
            cheap = {"steps": 1, "warmup": 0, "batch_size": 1, "resolution": 64}
            node.keywords += [ast.keyword(name, ast.Constant(number)) for name, number in cheap.items()]
        return node


def run_snippet(code: str, names: dict[str, Any], where: str, *, steps: int | None = STEPS) -> None:
    """Runs code as a page shows it: calls take `steps`, unless it is None, and "cuda" is the simulated device.

    The simulated device takes no weights from GGUF files, so without a GPU these are not offloaded.

    Raises:
        Whatever the code raises.
    """
    tree = ast.fix_missing_locations(_Cheaper(steps, moves=".gguf" not in code).visit(ast.parse(code)))
    moving: AbstractContextManager[Any] = (
        parameters_that_move() if "cuda" in code or "offload" in code else nullcontext()
    )
    with moving:
        exec(compile(tree, where, "exec"), names)
