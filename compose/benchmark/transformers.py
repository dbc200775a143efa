"""Costs of LoRAs in a forward pass of a transformer of full size, run without values on the meta device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention import Gates, JointRegions, Lora, LoraFactors, backbone_of, grid_at, install
from lora_compose.attention.backbones.truncation import replace_children
from lora_compose.attention.claims import undoing
from lora_compose.attention.device import modules_of
from lora_compose.attention.sites import Grid
from lora_compose.compose.benchmark.architectures import TRANSFORMERS
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.compose.benchmark.memory import added_memory
from lora_compose.compose.benchmark.peaks import FusedAttention
from lora_compose.pipelines.families.flux3 import PAD_MULTIPLE

META = torch.device("meta")
TOKENS, REGION_TOKENS = 512, 12
"""Tokens of the text, as most of these models read it, and of the text of each region ("a photo of a sks cat")."""
SHOWN: Mapping[str, str] = {name: name for name in TRANSFORMERS}
READING: Mapping[str, str] = {
    "FLUX.1 Kontext": "FLUX.1",
    **{name: name for name in ("FLUX.2-dev", "FLUX.2-klein 4B", "FLUX.2-klein 9B", "FLUX.3")},
    "Qwen-Image-Edit-Plus": "Qwen-Image",
}
"""Models that read reference images, and the one of `TRANSFORMERS` that has their layers."""
IMAGE_TOKENS = 203
"""Tokens of a reference image in each text of Qwen-Image-Edit-Plus: 7 around 14 x 14, of 28 x 28 pixels each."""


@dataclass(frozen=True)
class PassCost:
    """The costs of one forward pass of one row with `regional` and texts of regions.

    LoRAs act in all layers at once. A multiplication and an addition count as two FLOPs. Peak memory includes model and
    LoRAs; `offloaded_bytes` is the peak if only one block at a time is on the device (group offloading by blocks).
    """

    flops: int
    peak_bytes: int
    offloaded_bytes: int


def block_lora(model: nn.Module, rank: int) -> Lora:
    """Factors without values for every linear layer that sees text or image; modulation layers are left alone."""
    lora = {}
    for name, site in backbone_of(model).sites.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and not {"row", "modulation"} & set(site.parts):
            to: dict[str, Any] = {"device": META, "dtype": layer.weight.dtype}
            lora[name] = LoraFactors(
                torch.empty(rank, layer.in_features, **to), torch.empty(layer.out_features, rank, **to)
            )
    return lora


def texts_of(model: str, references: int) -> tuple[int, int]:
    """Tokens of the text of the whole image and of that of each region, in one of `SHOWN` or `READING`."""
    if model == "FLUX.3":  # which reads the padding of each text
        return TOKENS, PAD_MULTIPLE
    images = IMAGE_TOKENS * references if model == "Qwen-Image-Edit-Plus" else 0
    return TOKENS + images, REGION_TOKENS + images


def pass_cost(
    model: Any,
    concepts: int,
    rank: int,
    latent_grid: Grid,
    tokens: int = TOKENS,
    region_tokens: int = REGION_TOKENS,
    references: int = 0,
) -> PassCost:
    """Runs one pass of `regional` on the meta device: a text for each region, and gates by concept, token and cell.

    Each LoRA has a column of the image; 0 concepts are the plain model. Of blocks that are alike, two are run.

    Args:
        latent_grid: Height and width.
        tokens: Of the text of the whole image.
        region_tokens: Of the text of each region.
        references: Reference images, as large as the image.
    """
    weights, lora = [*model.parameters(), *model.buffers()], block_lora(model, rank) if concepts else {}
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in _blocks(model)]
    memory, operations = added_memory("meta", weights), Operations()
    with _two_for_all(model, operations):
        there = modules_of(model)
        run = {name: factors for name, factors in lora.items() if name in there}
        _run_pass(model, [run] * concepts, latent_grid, tokens, region_tokens, references, memory, operations)
    others = concepts * sum(
        factors.down.nbytes + factors.up.nbytes for name, factors in lora.items() if name not in run
    )
    peak_bytes = memory.peak_bytes + others
    return PassCost(operations.flops, peak_bytes, peak_bytes - sum(blocks) + max(blocks))


def _run_pass(
    model: Any,
    loras: Sequence[Lora],
    latent_grid: Grid,
    tokens: int,
    region_tokens: int,
    references: int,
    memory: Any,
    operations: Operations,
) -> None:
    """Runs the pass of `pass_cost`, watched by `memory`, and its forward pass by `operations` too."""
    plain: Any = backbone_of(model)
    each, concepts = grid_at(latent_grid, 1), len(loras)
    backbone = type(plain)(model, reference=True, cells=references * prod(each)) if references else plain
    channels, site = model.config["in_channels"], backbone.joint
    texts = (tokens, *[region_tokens] * concepts)
    if site is not None:  # where the image reads the text by cross-attention, all regions read one
        tokens = site.padded(sum(texts))
    inputs = _inputs(model, tokens)
    text = inputs.pop("text")
    if {
        "joint_attention_dim",
        "text_hidden_dim",
        "llm_features_dim",
    } & model.config.keys():  # whose channels are those of a patch
        channels //= 4
    latents = torch.empty(1, channels, *latent_grid, device=META, dtype=text.dtype)
    if references:
        inputs["reference"] = torch.empty(1, references * prod(each), 4 * channels, device=META, dtype=text.dtype)
        inputs["reference_grids"] = [each] * references
    height, width = grid_at(latent_grid, 1)
    gates = Gates(
        torch.empty(1, tokens, concepts),
        {1: torch.empty(1, height * width, concepts)},
        torch.empty(1, concepts),
        latent_grid,
    )
    regions = None
    if concepts and site is not None:
        columns = torch.arange(width) * concepts // width
        cells = (columns[:, None] == torch.arange(concepts)).expand(height, -1, -1).flatten(0, 1)
        regions = JointRegions.of(site, cells, texts, [False], isolate=False, device=META)
    with torch.no_grad(), FusedAttention(), memory, install(backbone, loras, device=META, dtype=text.dtype) as there:
        there.use(there.inputs(gates, text, lengths=(tokens,), joint_regions=regions))
        with operations:
            backbone.forward(latents, torch.ones((), device=META), text, inputs.pop("added"), **inputs)


@contextmanager
def _two_for_all(model: nn.Module, operations: Operations) -> Iterator[None]:
    """Inside this block a model has two of blocks that are alike; the second counts for all but the first.

    It finds in memory almost all that a later one would find.
    """
    with undoing(model) as undo:
        for parent, name, blocks in list(_alike(model)):
            second, started = blocks[1], []
            undo.callback(second.register_forward_pre_hook(_noting(started, operations)).remove)
            undo.callback(second.register_forward_hook(_repeating(len(blocks) - 2, started, operations)).remove)
            replace_children(parent, undo, **{name: blocks[:2]})
        yield


def _noting(started: list[int], operations: Operations) -> Any:
    return lambda *_: started.append(operations.flops)


def _repeating(others: int, started: list[int], operations: Operations) -> Any:
    def repeat(*_: Any) -> None:
        operations.flops += others * (operations.flops - started.pop())

    return repeat


def _alike(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """Lists of more than two blocks of the same class and shapes, that are in no other, by their parents."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            kinds = {
                (type(block), *((key, weight.shape) for key, weight in block.named_parameters())) for block in child
            }
            if len(kinds) == 1 and len(child) > 2:
                yield model, name, child
                continue
        yield from _alike(child)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that group offloading brings to the device one after the other."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def _inputs(model: Any, tokens: int) -> dict[str, Any]:
    """The text, and the further arguments of each family's forward pass."""
    config: Mapping[str, Any] = model.config
    dtype = next(model.parameters()).dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=META, dtype=dtype)

    if "cap_feat_dim" in config:
        return {"text": empty(1, tokens, config["cap_feat_dim"]), "added": {"lengths": torch.tensor([tokens])}}
    if "text_hidden_dim" in config:
        mask = torch.ones(1, tokens, dtype=torch.bool)
        text = empty(1, tokens, config["num_text_layers"] * config["text_hidden_dim"])
        return {"text": text, "added": {"text_mask": mask.to(META)}}
    if "llm_features_dim" in config:
        mask = torch.ones(1, tokens, dtype=torch.bool, device=META)
        added = {"text_mask": mask, "unconditional": torch.tensor([False])}
        return {"text": empty(1, tokens, config["llm_features_dim"]), "added": added}
    if "text_embed_dim" in config:
        return {"text": empty(1, tokens, config["text_embed_dim"]), "added": None}
    text = empty(1, tokens, config["joint_attention_dim"])
    guidance = {"guidance": empty(1)} if config.get("guidance_embeds") else {}
    if "approximator_layers" in config:
        return {"text": text, "added": {"text_mask": empty(1, tokens)}}
    if "pooled_projection_dim" not in config:
        return {"text": text, "added": None, **guidance}
    return {"text": text, "added": {"pooled_projections": empty(1, config["pooled_projection_dim"])}, **guidance}
