"""Tiny random models of ComfyUI's own classes, sampled by its own KSampler: for tests that are run with `-m comfyui`.

The environment variable COMFYUI_PATH is a checkout of ComfyUI.
"""
# ruff: noqa: C408, E402

import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

if not os.environ.get("COMFYUI_PATH"):
    raise RuntimeError("set COMFYUI_PATH to a checkout of ComfyUI: make comfyui COMFYUI_PATH=...")
sys.path.insert(0, os.environ["COMFYUI_PATH"])

from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

args.cpu = True  # before anything else of ComfyUI looks for a device

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.ops  # pyright: ignore[reportMissingImports]
import comfy.sample  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]

from lora_compose.compose.comfyui.composition import ComposedConcepts
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.files import read_concept
from lora_compose.pipelines.formats.files import read_lora
from norm_reference import region_normalised, shares_by_hand

logging.getLogger().setLevel(logging.ERROR)  # ComfyUI's log
GRID, WIDTH, TOKENS = (12, 16), 16, 8
CPU = torch.device("cpu")


def unet(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None, *, xl: bool = False) -> Any:
    """Stable Diffusion 1.x, or XL."""
    config = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=(1, 2),
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, legacy=False,
        use_spatial_transformer=True, context_dim=WIDTH, use_linear_in_transformer=xl, use_temporal_attention=False,
        adm_in_channels=6 * 256 + 8 if xl else None, num_classes="sequential" if xl else None,
    )  # fmt: skip
    family = (comfy.supported_models.SDXL if xl else comfy.supported_models.SD15)(config)
    family.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    return patcher_of(family, dtype, cast)


def sdxl(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    return unet(dtype, cast, xl=True)


def flux(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    from comfy.ldm.flux.model import FluxParams  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = dict(
        image_model="flux", in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=WIDTH, hidden_size=32,
        mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    return patcher_of(comfy.supported_models.Flux(config), dtype, cast)


def flux2(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """FLUX.2, whose texts ComfyUI fills with zeros in front, to 512 tokens."""
    config: dict[str, Any] = dict(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=WIDTH, hidden_size=32,
        mlp_ratio=3.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 4, 4, 4], theta=2000, patch_size=1,
        qkv_bias=False, guidance_embed=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
        txt_ids_dims=[3],
    )  # fmt: skip
    return patcher_of(comfy.supported_models.Flux2(config), dtype, cast)


def chroma(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """FLUX.1's blocks, whose modulation one network makes for all."""
    from comfy.ldm.chroma.model import ChromaParams  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = dict(
        image_model="chroma", in_channels=16, out_channels=16, vec_in_dim=0, context_in_dim=WIDTH, hidden_size=32,
        mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2,
        qkv_bias=True, in_dim=64, out_dim=32, hidden_dim=32, n_layers=2, txt_ids_dims=[],
    )  # fmt: skip
    for name in ("vec_in_dim", "txt_ids_dims"):
        if name not in ChromaParams.__dataclass_fields__:  # of older versions
            del config[name]
    return patcher_of(comfy.supported_models.Chroma(config), dtype, cast)


def z_image(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """Z-Image; its width is at least that of its time embedding, 256."""
    config = dict(
        image_model="lumina2", in_channels=4, dim=256, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        multiple_of=32, ffn_dim_multiplier=0.25, qk_norm=True, cap_feat_dim=WIDTH, axes_dims=[16, 24, 24],
        axes_lens=[1536, 512, 512], rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32,
    )  # fmt: skip
    return patcher_of(comfy.supported_models.ZImage(config), dtype, cast)


def qwen_image(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """Qwen-Image, whose latents have a dimension of frames."""
    config = dict(
        image_model="qwen_image", in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return patcher_of(comfy.supported_models.QwenImage(config), dtype, cast)


def krea2(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """Krea 2, whose text is that of two layers of a text encoder."""
    config = dict(
        image_model="krea2", features=32, tdim=16, txtdim=WIDTH // 2, heads=2, kvheads=1, multiplier=1, layers=3,
        txtlayers=2, txtheads=2, txtkvheads=1,
    )  # fmt: skip
    patcher = patcher_of(comfy.supported_models.Krea2(config), dtype, cast)
    for name, weight in patcher.model.named_parameters():
        if weight.dim() == 1 and not name.endswith("bias"):  # norms and modulation are stored as what is added to 1
            weight.data = (weight.float() - 1).to(dtype)
    return patcher


def anima(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    """Anima, with a small adapter of its text."""
    import comfy.ldm.anima.model as anima  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = dict(
        image_model="anima", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, model_channels=32, concat_padding_mask=True, crossattn_emb_channels=WIDTH,
        pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
        use_adaln_lora=True, adaln_lora_dim=8, num_blocks=3, num_heads=2, extra_per_block_abs_pos_emb=False,
    )  # fmt: skip
    small = dict(source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=1, num_heads=2)
    with mock.patch.object(anima, "LLMAdapter", partial(anima.LLMAdapter, **small)):
        return patcher_of(comfy.supported_models.Anima(config), dtype, cast)


FAMILIES = {"sd": unet, "sdxl": sdxl, "flux": flux, "chroma": chroma}
for name, made in (
    ("Flux2", flux2),
    ("ZImage", z_image),
    ("QwenImage", qwen_image),
    ("Krea2", krea2),
    ("Anima", anima),
):
    if hasattr(comfy.supported_models, name):
        FAMILIES[made.__name__] = made


def patcher_of(family: Any, dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    family.set_inference_dtype(dtype, cast)
    torch.manual_seed(0)
    model = family.get_model({}, "")
    for name, weight in model.named_parameters():
        last = name.endswith(("out.2.weight", "final_layer.linear.weight", "proj_out.weight", "last.linear.weight"))
        if weight.dim() > 1:
            random = torch.randn(weight.shape) * weight[0].numel() ** -0.5 * (0.1 if last else 1)
        else:
            random = torch.randn(weight.shape) * 0.05 + ("bias" not in name)
        weight.data = random.to(dtype)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def quantised(name: str) -> Any:
    """A model whose linear layers are stored in fp8 with a scale of each, as in published files."""
    found, weights = FAMILIES[name]().model, {}
    linear = {f"{at}.weight" for at, layer in found.diffusion_model.named_modules() if isinstance(layer, nn.Linear)}
    for key, weight in found.diffusion_model.state_dict().items():
        layer = key.removesuffix(".weight")
        if key in linear:
            scale = weight.abs().max() / 448
            weights[f"{layer}.weight_scale"] = scale
            conf = json.dumps({"format": "float8_e4m3fn"}).encode()
            weights[f"{layer}.comfy_quant"] = torch.tensor([*conf], dtype=torch.uint8)
            weight = (weight / scale).to(torch.float8_e4m3fn)
        weights[key] = weight
    family = type(found.model_config)({**found.model_config.unet_config})
    family.quant_config = {"mixed_ops": True}
    family.set_inference_dtype(torch.float32, None)
    model = family.get_model({}, "")
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


class PackedWeight(Tensor):
    """A weight as ComfyUI-GGUF has it: bytes that say that they have the weight's shape, and stay as they are."""

    sides: torch.Size

    @property
    def shape(self) -> torch.Size:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self, "sides", self.size())

    def detach(self) -> Tensor:
        return self

    def clone(self, *, memory_format: torch.memory_format | None = None) -> Tensor:
        return self

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        moved = super().to(*arguments, **options)
        moved.sides = self.shape  # pyright: ignore[reportAttributeAccessIssue]
        return moved


class PackedLinear(comfy.ops.manual_cast.Linear):
    """Stands for ComfyUI-GGUF's linear layer, which makes numbers of its bytes in each call: four bits, one scale."""

    comfy_cast_weights = True

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().max() / 7
        codes = ((layer.weight / self.scale).round() + 8).to(torch.uint8).flatten()
        packed = (codes[::2] + 16 * codes[1::2]).as_subclass(PackedWeight)
        packed.sides = layer.weight.shape
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Sizes alone, by which ComfyUI counts memory."""
        destination[f"{prefix}weight"] = torch.empty(self.weight.size(), dtype=torch.uint8, device="meta")
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.to("meta")

    def dense(self) -> Tensor:
        packed = self.weight.as_subclass(Tensor)
        codes = torch.stack([packed % 16, packed // 16], dim=-1).float() - 8
        return codes.flatten().view(self.weight.shape) * self.scale

    def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dense().to(input.dtype), bias)


def packed(name: str) -> Any:
    """A model whose linear layers are like those of ComfyUI-GGUF's loader."""
    patcher = FAMILIES[name]()
    model = patcher.model.diffusion_model
    for at, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and layer.weight.numel() % 2 == 0:
            model.set_submodule(at, PackedLinear(layer))
    return patcher


def tensors_of(patcher: Any, seed: int, rank: int = 3) -> dict[str, Tensor]:
    """A LoRA of all layers, by ComfyUI's own names."""
    torch.manual_seed(seed)
    found = {}
    for name, layer in patcher.model.diffusion_model.named_modules():
        if (hasattr(layer, "in_features") or isinstance(layer, nn.Conv2d)) and not name.startswith("llm_adapter"):
            inputs = (layer.in_channels, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
            ones, start = [1] * (len(inputs) - 1), f"diffusion_model.{name}"
            found[f"{start}.lora_down.weight"] = torch.randn(rank, *inputs) * torch.Size(inputs).numel() ** -0.5
            found[f"{start}.lora_up.weight"] = torch.randn(layer.weight.shape[0], rank, *ones) * 0.7
            found[f"{start}.alpha"] = torch.tensor(2.0)
    return found


def read(patcher: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The factors of a file with these tensors, as the nodes read it."""
    path = folder / f"{len([*folder.iterdir()])}.safetensors"
    save_file(dict(tensors), path)
    model, names = patcher.model.diffusion_model, comfy.lora.model_lora_keys_unet(patcher.model, {})
    return read_concept(read_lora(path), model, names, family_of(model).sites)[0]


def text(seed: int, tokens: int = TOKENS) -> list[list[Any]]:
    """A conditioning; T5's numbers are for Anima alone."""
    torch.manual_seed(seed)
    found = torch.randn(1, tokens, WIDTH), {"pooled_output": torch.randn(1, 8)}
    found[1].update(t5xxl_ids=torch.randint(32128, (tokens,)), t5xxl_weights=torch.ones(tokens))
    return [[*found]]


def empty(patcher: Any, batch: int = 1, grid: tuple[int, int] = GRID) -> Tensor:
    """Latents of zeros."""
    if patcher.model.latent_format.latent_dimensions == 3:  # with frames
        return torch.zeros(batch, patcher.model.latent_format.latent_channels, 1, *grid)
    config = patcher.model.model_config.unet_config
    of_patch = 4 if config.get("image_model") == "chroma" else 1  # which counts the channels of a patch
    return torch.zeros(batch, config["in_channels"] // of_patch, *grid)


def is_joint(patcher: Any) -> bool:
    """Whether text and image are in one sequence."""
    return not any(hasattr(patcher.model.diffusion_model, name) for name in ("input_blocks", "llm_adapter"))


def seen_text(patcher: Any, conditioning: Sequence[Sequence[Any]]) -> Tensor:
    """What a model reads of a conditioning: itself, but Anima makes another text of it."""
    ((text, options),) = conditioning
    adapter = getattr(patcher.model.diffusion_model, "preprocess_text_embeds", None)
    if adapter is None:
        return text
    with torch.no_grad():
        return adapter(text, options["t5xxl_ids"][None], options["t5xxl_weights"][None, :, None])


def drawn(
    patcher: Any,
    positive: list,
    negative: list,
    cfg: float = 4.0,
    batch: int = 1,
    sampler: str = "euler",
    grid: tuple[int, int] = GRID,
    steps: int = 3,
    last: int | None = None,
) -> Tensor:
    """Latents, by ComfyUI's KSampler."""
    latents = empty(patcher, batch, grid)
    noise = comfy.sample.prepare_noise(latents, 7)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        return comfy.sample.sample(
            patcher, noise, steps, cfg, sampler, "normal", positive, negative, latents, last_step=last,
            disable_pbar=True, seed=7,
        )  # fmt: skip


Masks = Sequence[Tensor | None]
"""Where each concept acts; None is everywhere."""


def front_of(patcher: Any, text: Tensor) -> int:
    """How many zeros ComfyUI puts before a text."""
    return max(0, 512 - text.shape[1]) if hasattr(patcher.model.diffusion_model, "single_stream_modulation") else 0


class Reference:
    """Dense deltas by plain hooks, one conditioning at a time: it knows no sites, levels, ranks or bank.

    Masks follow from the shapes of outputs, our conditioning is known by its numbers.

    Args:
        images: The masks of all concepts; of each image if there are several.
    """

    def __init__(self, patcher: Any, plan: ComposedConcepts, positive: list, *images: Masks) -> None:
        self.plan, self.images, self.mine = plan, images, seen_text(patcher, positive)
        self.model, self.patcher = patcher.model.diffusion_model, patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self.each)
        self.joint, self.pad = is_joint(patcher), getattr(self.model, "pad_tokens_multiple", None) or 1
        self.ours, self.tokens, self.grid, self.steps = False, 0, GRID, 0
        self.levels_of_noise: list[float] = []
        self.reading: int | None = None
        self.front = front_of(patcher, self.mine)
        texts = [seen_text(patcher, text) for text in plan.texts]
        texts = [F.pad(text, (0, 0, front_of(patcher, text), 0)) for text in texts]
        self.read = torch.cat(texts, dim=1) if texts else self.mine
        self.lengths = [text.shape[1] for text in texts]
        if texts:
            self.words = plan.words.repeat_interleave(torch.tensor(self.lengths), dim=0)
        elif plan.kept is not None:  # all but the words of others
            self.words = F.pad(1 - plan.kept, (0, 0, self.front, 0), value=1)
        else:  # zeros have no words
            self.words = plan.words if len(plan.words) == 1 else F.pad(plan.words, (0, 0, self.front, 0))

    @contextmanager
    def hooked(self) -> Iterator[Any]:
        deltas = [{name: factors.delta() for name, factors in lora.items()} for lora in self.plan.loras]
        handles = []
        for name in {name for lora in deltas for name in lora}:

            def hook(layer: nn.Module, given: tuple, out: Tensor, name: str = name) -> Tensor:
                return self.added(name, layer, given[0], out, deltas)

            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        norms = [module for module in self.model.modules() if isinstance(module, torch.nn.GroupNorm)]
        handles += [norm.register_forward_hook(self.normalised) for norm in norms]
        swapped = []
        if self.lengths:
            swapped = self.count_by_text() if self.joint else self.read_by_region()
        try:
            yield self.patcher
        finally:
            for handle in handles:
                handle.remove()
            for module in swapped:
                del module.forward

    def draw(self, positive: list, negative: list, **options: Any) -> Tensor:
        self.grid, self.steps, self.levels_of_noise = options.get("grid", GRID), options.get("steps", 3), []
        with self.hooked() as patcher:
            return drawn(patcher, positive, negative, **options)

    def each(self, apply: Any, given: Any) -> Tensor:
        parts, chunks, length = [], len(given["cond_or_uncond"]), self.mine.shape[1]
        if (level := float(given["timestep"].max())) not in self.levels_of_noise:
            self.levels_of_noise.append(level)
        size = len(given["input"]) // chunks
        for i in range(chunks):
            rows = slice(i * size, (i + 1) * size)
            c: dict[str, Any] = {name: x[rows] if torch.is_tensor(x) else x for name, x in given["c"].items()}
            read = c["c_crossattn"]
            start = self.front if read.shape[1] > length else 0
            self.ours = read.shape[1] >= length and torch.equal(read[:1, start : start + length], self.mine)
            if self.ours:
                # ComfyUI repeats shorter texts.
                alone = read[:, : start + length]
                c["c_crossattn"] = self.read.expand(len(read), -1, -1) if self.lengths else alone
                options = {**c["transformer_options"], "optimized_attention_override": self.attend}
                c["transformer_options"] = options
            self.tokens = c["c_crossattn"].shape[1]
            parts.append(apply(given["input"][rows], given["timestep"][rows], **c))
        return torch.cat(parts)

    def attend(
        self, core: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any
    ) -> Tensor:
        """Scores of our conditioning with what is forbidden, or more or less likely."""
        assert mask is None
        at = 2 if options.get("skip_reshape") else 1
        if self.joint and (self.lengths or self.isolated):
            if k.shape[at] == getattr(self.model, "txtlayers", None):  # Krea 2, for each token apart
                return core(q, k, v, heads, **options)
            seen = self.allowed(k.shape[at])
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            bias, start = self.bias(self.patches), self.filled(self.tokens)
            if self.isolated and self.plan.phrases is not None and k.shape[at] == start + self.filled(bias.shape[1]):
                bias = F.pad(bias, (0, 0, start, k.shape[at] - start - bias.shape[1]))
                bias = F.pad(bias, (0, k.shape[at] - self.tokens))
                mask = mask + bias + bias.transpose(1, 2)
            mask = mask.expand(len(q), -1, -1)
        elif self.lengths and self.isolated and k.shape[at] == q.shape[at]:
            seen = self.seen(self.grid_of(k.shape[at]))
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).expand(len(q), -1, -1)
        elif self.plan.phrases is not None and not self.joint and k.shape[at] == self.tokens:
            mask = self.bias(self.grid_of(q.shape[at])).expand(len(q), -1, -1)
        return core(q, k, v, heads, mask, **options)

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """Between cells and words. Shape: [images, cells, tokens]."""
        if self.plan.phrases is None:
            return torch.zeros(1, grid[0] * grid[1], self.tokens)
        phrases = F.pad(self.plan.phrases, (0, 0, self.front, self.tokens - self.front - len(self.plan.phrases)))
        bias = torch.zeros(())
        for i in range(len(self.plan.loras)):
            for j in range(len(self.plan.loras)):
                drawn = phrases[:, j] * (1 if i == j else -1) * float(phrases[:, i].any())
                bias = bias + self.share(i, grid).flatten(1)[..., None] * drawn
        return bias

    @property
    def isolated(self) -> bool:
        """Whether a region sees no other one in this step."""
        return len(self.levels_of_noise) <= math.ceil(self.plan.isolate * self.steps)

    @property
    def patches(self) -> tuple[int, int]:
        """Height and width of the cells of a joint sequence."""
        height, width = (-(-side // getattr(self.model, "patch_size", 2)) for side in self.grid)
        return height, width

    def normalised(self, norm: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """By region in the first 0.4 of the steps."""
        here = [i for i, mask in enumerate(self.images[0]) if mask is not None and self.plan.weights[i].constant != 0]
        if not here or len(self.levels_of_noise) > math.ceil(0.4 * self.steps):
            return out
        (x,) = given
        masks = torch.stack([torch.stack([self.small(each[i], x.shape[2:]) for i in here]) for each in self.images])
        by_region = region_normalised(x, shares_by_hand(masks), norm.num_groups, norm.eps)
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)  # ComfyUI may store them in less
        return F.group_norm(by_region, norm.num_groups, weight, bias, norm.eps)

    def added(self, name: str, layer: Any, x: Tensor, out: Tensor, deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
        weights = self.plan.weights_at(len(self.levels_of_noise) - 1, self.steps)
        for n, lora in enumerate(deltas):
            if name in lora:
                delta = lora[name].to(x.dtype)
                conv = delta.dim() == 4
                change = F.conv2d(x, delta, None, layer.stride, layer.padding) if conv else F.linear(x, delta)
                gate = self.gate(name, n, out)
                out = out + (weights[n] * gate * change).to(out.dtype)
        return out

    def gate(self, name: str, n: int, out: Tensor) -> Tensor | float:
        on_image = self.ours or self.plan.image_of_others
        on_text = self.ours or self.plan.text_of_others
        everywhere = self.images[0][n] is None
        if self.reading is not None and re.search(r"attn2\.to_([kv]|out)|cross_attn\.([kv]|output)_", name):
            return float(self.ours and (everywhere or self.reading == n))
        if re.search(r"time_embed|label_emb|emb_layers", name):
            return float(on_image)
        if re.search(
            r"(time|vector|guidance)_in|_mod\.|modulation|ada(LN|ln_mod)|distilled|t_embedder|time_text|norm_out|^tmlp|tproj",
            name,
        ):
            return float(on_image and everywhere)
        # On other conditionings only methods without token gates act, and on all tokens.
        words = self.words[:, n, None].expand(-1 if len(self.words) > 1 else self.tokens, 1)
        words = words if self.ours else torch.full((self.tokens, 1), float(words.mean()))
        tokens = self.filled(self.tokens)
        if re.search(r"txtfusion\.(layerwise|projector)", name):  # all tokens, or rows, before layers of the encoder
            words = words_to(words, self.tokens, bool(self.lengths)) * float(on_text)
            return words[None, ..., None] if "projector" in name else words.repeat(len(out) // len(words), 1)[..., None]
        if re.search(r"attn2\.to_[kv]|cross_attn\.[kv]_|txt|add_|cap_|context_refiner", name):
            return words_to(words, out.shape[1], bool(self.lengths)) * float(on_text)
        if out.dim() == 4:
            return self.share(n, out.shape[2:])[:, None] * float(on_image)
        if out.dim() == 5:
            return self.share(n, out.shape[2:4])[:, None, ..., None] * float(on_image)
        single = name.startswith(("single", "layers", "final_layer.linear")[: 3 if self.pad > 1 else 1])
        single |= hasattr(self.model, "txtfusion") and name.startswith(("blocks", "last"))
        cells = out.shape[1] - (tokens if single else 0)
        here = self.share(n, self.grid_of(cells)).flatten(1)[..., None] * float(on_image)
        rest = torch.full((len(here), cells - here.shape[1], 1), float(on_image and everywhere))  # it is filled up
        here = torch.cat([here, rest], dim=1)
        words = words_to(words, tokens, bool(self.lengths))
        return torch.cat([words.expand(len(here), -1, 1) * float(on_text), here], dim=1) if single else here

    def filled(self, positions: int) -> int:
        return -(-positions // self.pad) * self.pad

    def grid_of(self, cells: int) -> tuple[int, int]:
        height, width = self.grid
        while cells not in (height * width, self.filled(height * width)):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def share(self, n: int, grid: Sequence[int]) -> Tensor:
        """How much of each cell is in the region of a concept. Shape: [images, height, width]."""
        return torch.stack([self.small(masks[n], grid) for masks in self.images])

    def small(self, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
        if mask is None:
            return torch.ones(*grid)
        mean = F.adaptive_avg_pool2d(mask[None], (grid[0], grid[1]))[0]
        return mean / mean.max().clamp(min=1e-9)

    def shares(self, grid: Sequence[int]) -> Tensor:
        """Share of each text in what a cell reads. Shape: [images, cells, texts]."""
        inside = torch.stack([self.share(n, grid).flatten(1) >= 0.5 for n in self.plan.owners], dim=2)
        every = torch.cat([~inside.any(dim=2, keepdim=True), inside], dim=2).float()
        return every / every.sum(dim=2, keepdim=True)

    def seen(self, grid: Sequence[int]) -> Tensor:
        """True where a cell attends to another. Shape: [images, cells, cells]."""
        shares = (self.shares(grid) > 0).float()
        return (shares @ shares.mT > 0) | (shares[..., :1] > 0) | (shares[:, None, :, 0] > 0)

    def allowed(self, positions: int) -> Tensor:
        """Who attends to whom in a joint sequence, or in one of its parts; what is filled up is of text 0.

        Shape: [images, positions, positions].
        """
        lengths = self.lengths or [self.tokens]
        of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        of_token = F.pad(of_token, (0, self.filled(len(of_token)) - len(of_token)))
        reads, both = self.shares(self.patches) > 0, self.seen(self.patches) | torch.tensor(not self.isolated)
        rest = self.filled(reads.shape[1]) - reads.shape[1]
        reads, both = F.pad(reads, (0, 0, 0, rest)), F.pad(both, (0, rest, 0, rest), value=True)
        reads[..., 0] = True
        cells, texts = reads[..., of_token], (of_token[:, None] == of_token).expand(len(reads), -1, -1)
        if positions in (texts.shape[1], cells.shape[1]):
            return texts if positions == texts.shape[1] else both
        return torch.cat([torch.cat([texts, cells.mT], dim=2), torch.cat([cells, both], dim=2)], dim=1)

    def count_by_text(self) -> list[Any]:
        """Qwen-Image: each text begins where the first one does."""
        if not hasattr(self.model, "time_text_embed"):
            return []
        count = self.model.pe_embedder.forward

        def forward(ids: Tensor) -> Tensor:
            if self.ours:
                starts = torch.cat([torch.zeros(1), torch.tensor(self.lengths).cumsum(0)[:-1]])
                ids = ids.clone()
                ids[:, : self.tokens] -= starts.repeat_interleave(torch.tensor(self.lengths))[:, None]
            return count(ids)

        self.model.pe_embedder.forward = forward
        return [self.model.pe_embedder]

    def read_by_region(self) -> list[Any]:
        """Cross-attention text by text, each with the LoRA of its concept alone, and the mean over the texts."""
        modules: list[Any] = [
            module
            for name, module in self.model.named_modules()
            if name.endswith((".attn2", ".cross_attn")) and not name.startswith("llm_adapter")
        ]
        for module in modules:

            def forward(
                x: Tensor, context: Tensor, *further: Any, read: Any = module.forward, **options: Any
            ) -> Tensor:
                if not self.ours:
                    return read(x, context, *further, **options)
                total, shares = torch.zeros(()), self.shares(self.grid_of(x.shape[1]))
                for n, part in enumerate(context.split(self.lengths, dim=1)):
                    self.reading = -1 if n == 0 else self.plan.owners[n - 1]
                    total = total + shares[..., n, None] * read(x, part, *further, **options)
                self.reading = None
                return total

            module.forward = forward
        return modules


def words_to(words: Tensor, tokens: int, several: bool) -> Tensor:
    """The gate of tokens with what ComfyUI fills them up with: a part of the first of several texts, or no word."""
    if len(words) >= tokens:
        return words
    rest = words[:1] if several or bool((words == 1).all()) else torch.zeros(1, 1)
    return torch.cat([words, rest.repeat(tokens - len(words), 1)])


def maps_of_draft(patcher: Any, plain: list, negative: list, words: Tensor, **options: Any) -> Tensor:
    """Attention to words in the base model: the sum over steps, or of the last one if text and image are one sequence.

    Shape: [images, maps, height, width].
    """
    found: list[tuple[float, Tensor]] = []
    halved = getattr(patcher.model.diffusion_model, "patch_size", 2)
    sides = [-(-side // halved) for side in options.get("grid", GRID)]
    cells, model = sides[0] * sides[1], patcher.model.diffusion_model

    layers: list[Tensor] = []
    front, wanted = front_of(patcher, plain[0][0]), seen_text(patcher, plain)
    words = F.pad(words, (0, 0, 0, wanted.shape[1] - len(words)))

    def attend(core: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *further: Any, **more: Any) -> Tensor:
        query, key = q, k
        if not more.get("skip_reshape"):
            query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        layers.append(scores.softmax(dim=-1).mean(dim=1))
        return core(q, k, v, heads, *further, **more)

    def each(apply: Any, given: Any) -> Tensor:
        size, parts, tokens = len(given["input"]) // len(given["cond_or_uncond"]), [], front + len(words)
        for rows in torch.arange(len(given["input"])).split(size):
            c: dict[str, Any] = {name: x[rows] if torch.is_tensor(x) else x for name, x in given["c"].items()}
            mine = torch.equal(c["c_crossattn"][:1, front:tokens], wanted)
            if mine:
                c["c_crossattn"] = c["c_crossattn"][:, :tokens]
            c["transformer_options"] = {**c["transformer_options"], "optimized_attention_override": attend}
            layers.clear()
            parts.append(apply(given["input"][rows], given["timestep"][rows], **c))
            if mine:
                shown = [one for one in layers if one.shape[1:] == (cells, tokens)]
                shown = shown[-1:] if hasattr(model, "llm_adapter") else shown
                if is_joint(patcher):  # single-stream blocks, or the last third, which is one of two or three
                    single = layers[len(model.double_blocks) :] if hasattr(model, "double_blocks") else layers[-1:]
                    pad = getattr(model, "pad_tokens_multiple", None) or 1
                    start = -(-tokens // pad) * pad
                    shown = [layer[:, start : start + cells, front:tokens] for layer in single]
                found.append((float(given["timestep"].max()), torch.stack(shown).mean(dim=0) @ words))
        return torch.cat(parts)

    watched = patcher.clone()
    watched.set_model_unet_function_wrapper(each)
    drawn(watched, plain, negative, **options)
    last = min(level for level, _ in found)
    maps = [of_step for level, of_step in found if level == last or not is_joint(patcher)]
    return torch.stack(maps).sum(dim=0).transpose(1, 2).unflatten(2, sides)
