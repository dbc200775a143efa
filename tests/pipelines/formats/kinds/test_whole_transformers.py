"""One DoRA or OFT file on a whole transformer equals dense weights, also where its layers are several of the model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components import seeded
from flux import FLUX
from lora_compose import Concept
from lora_compose.attention import BankCache, KeptBanks, install
from lora_compose.attention.backbones import backbone_of
from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import modules_of
from lora_compose.compose.lora.inspection import inspect
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.concepts.overload import joint_change
from lora_compose.pipelines.merging.expressed import expressed
from lora_compose.pipelines.scene.strength import in_blocks
from pairs import in_pairs
from reference import constant_gates, relative_error
from transformer_families import CALL, CELLS, Family, plain_latents, shared_pipeline
from z_image import Z_IMAGE

Kind = Literal["DoRA of outputs", "DoRA of inputs", "LoHa with DoRA of inputs", "OFT of outputs", "OFT of inputs"]
KINDS: tuple[Kind, ...] = (
    "DoRA of outputs", "DoRA of inputs", "LoHa with DoRA of inputs", "OFT of outputs", "OFT of inputs",
)  # fmt: skip
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A family, and by name in the file layers that are one layer there."""

    family: Family
    layers: Mapping[str, Sequence[str]]


DOUBLE, SINGLE = "transformer_blocks.1.attn", "single_transformer_blocks.0"
CASES = {
    "FLUX.1": Case(
        FLUX,
        {
            "double_blocks.1.img_attn.qkv": [f"{DOUBLE}.to_{x}" for x in "qkv"],
            "double_blocks.1.txt_attn.qkv": [f"{DOUBLE}.add_{x}_proj" for x in "qkv"],
            "double_blocks.1.txt_attn.proj": [f"{DOUBLE}.to_add_out"],
            "single_blocks.0.linear1": [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"],
            "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
            "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        },
    ),
    "Z-Image": Case(
        Z_IMAGE,
        {
            "layers.1.attention.qkv": [f"layers.1.attention.to_{x}" for x in "qkv"],
            "context_refiner.0.attention.qkv": [f"context_refiner.0.attention.to_{x}" for x in "qkv"],
            "layers.0.attention.out": ["layers.0.attention.to_out.0"],
        },
    ),
}


def low_rank(weight: Tensor, size: float = 0.5) -> tuple[Tensors, Tensor]:
    outputs, inputs = weight.shape
    down, up = torch.randn(3, inputs) * inputs**-0.5, torch.randn(outputs, 3) * size
    return {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(1.5),
    }, 0.5 * up.double() @ down.double()


def elementwise(weight: Tensor) -> tuple[Tensors, Tensor]:
    outputs, inputs = weight.shape
    pairs = [(torch.randn(outputs, 2), torch.randn(2, inputs) * inputs**-0.5) for _ in range(2)]
    named = {f"hada_w{i}_{x}": it for i, pair in enumerate(pairs, 1) for x, it in zip("ab", pair, strict=True)}
    (a, b), (c, d) = [(one.double(), other.double()) for one, other in pairs]
    return named | {"alpha": torch.tensor(2.0)}, (a @ b) * (c @ d)


def skew(blocks: int, size: int) -> Tensor:
    free = torch.randn(blocks, size, size) / 10
    return free - free.mT


def changed(kind: Kind, weight: Tensor) -> tuple[Tensors, Tensor]:
    """A layer's tensors in a file, and the weight W' by the formula of the kind, in float64."""
    outputs, inputs = weight.shape
    one = torch.eye(4).double()
    if kind == "OFT of outputs":
        turn = skew(outputs // 4, 4)
        whole = torch.block_diag(*(torch.linalg.inv(one + it) @ (one - it) for it in turn.double()))
        return {"oft_blocks": turn / 2}, whole @ weight
    if kind == "OFT of inputs":
        turn = skew(inputs // 4, 4)
        above = torch.triu_indices(4, 4, 1)
        series = [one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q for q in turn.double()]
        return {"oft_R.weight": turn[:, above[0], above[1]]}, weight @ torch.block_diag(*series).T
    named, delta = elementwise(weight) if "LoHa" in kind else low_rank(weight)
    axis = 1 if kind == "DoRA of outputs" else 0  # the one that is summed over
    norms = 1 + torch.rand(outputs if axis else inputs)
    named["dora_scale"] = norms[:, None] if axis else norms[None]
    whole = weight + delta
    return named, whole / whole.square().sum(axis, keepdim=True).sqrt() * named["dora_scale"].double()


def written(case: Case, kind: Kind, transformer: nn.Module, path: Path) -> dict[str, Tensor]:
    """Writes the file, and gives the dense weights of the model's layers."""
    torch.manual_seed(5)
    tensors: Tensors = {}
    dense: dict[str, Tensor] = {}
    for original, names in case.layers.items():
        parts = [transformer.get_submodule(name).get_parameter("weight").detach().double() for name in names]
        named, whole = changed(kind, torch.cat(parts))
        tensors |= {f"diffusion_model.{original}.{slot}": it.contiguous() for slot, it in named.items()}
        dense |= dict(zip(names, whole.split([len(part) for part in parts]), strict=True))
    save_file(tensors, path)
    return dense


def with_weights(case: Case, pipe: Any, dense: Mapping[str, Tensor], given: Mapping[str, Any]) -> Tensor:
    """What diffusers gives with these weights in a copy of the transformer."""
    transformer = copy.deepcopy(pipe.transformer)
    for name, weight in dense.items():
        transformer.get_submodule(name).weight.data.copy_(weight)
    other = copy.copy(pipe)
    other.register_modules(transformer=transformer)
    return plain_latents(case.family, other, **given)


@pytest.mark.parametrize(("kind", "family"), in_pairs(KINDS, CASES))
def test_the_image_is_that_of_dense_weights(kind: Kind, family: str, tmp_path: Path) -> None:
    case = CASES[family]
    pipe = shared_pipeline(case.family)
    path, given = tmp_path / "it.safetensors", {**CALL, **case.family.unguided}
    dense = written(case, kind, pipe.transformer, path)
    plain = plain_latents(case.family, pipe, **given)
    expected = with_weights(case, pipe, dense, given)
    assert relative_error(plain, expected) > 0.02

    def of_call(weight: float | str) -> Tensor:
        concept = Concept.model_validate({"name": "it", "lora": str(path), "weight": weight})
        return pipe(**given, concepts=[concept], method="merge", output_type="latent", generator=seeded(3)).images

    assert relative_error(of_call(1.0), expected) < 1e-4, "folded into the weights"
    assert relative_error(of_call("1..0.999999"), expected) < 1e-4, "gated, since it changes"


def test_norms_of_several_layers_are_those_of_the_weights_at_the_time(tmp_path: Path) -> None:
    """The bank of one call serves the next as long as none of the layers has another weight."""
    case = CASES["FLUX.1"]
    pipe = case.family.pipeline()
    transformer, path = copy.deepcopy(pipe.transformer), tmp_path / "it.safetensors"
    written(case, "DoRA of inputs", transformer, path)
    factors, cache = match(read_lora(path), pipe), BankCache(1 << 30)
    backbone, to = backbone_of(transformer), {"device": torch.device("cpu"), "dtype": torch.float32}
    query, key, value, _ = (transformer.get_submodule(name) for name in case.layers["single_blocks.0.linear1"])
    x = torch.randn(2, 5 + CELLS**2, query.in_features)  # text, then image

    def run(layer: nn.Module) -> Tensor:
        lora = factors.model
        with install(backbone, [lora], how="forward", kept=KeptBanks(cache, (("it",),)), **to) as there:
            there.use(there.inputs(constant_gates((1.0,))[0], lengths=[5, 5]))
            return layer(x)

    def expected(layer: nn.Module) -> Tensor:
        torch.manual_seed(5)
        dense = written(case, "DoRA of inputs", transformer, path)
        name = next(name for name, module in transformer.named_modules() if module is layer)
        return nn.functional.linear(x, dense[name].float(), layer.get_parameter("bias"))

    first = run(query)
    assert relative_error(first, expected(query)) < 1e-5
    (bank,) = cache._banks.values()
    assert torch.equal(run(query), first)
    assert [*cache._banks.values()] == [bank]
    value.weight.data *= 3
    assert relative_error(run(query), expected(query)) < 1e-5
    assert relative_error(run(query), first) > 0.05, "the norms are of all parts"
    assert relative_error(run(key), expected(key)) < 1e-5


def test_a_part_that_a_factor_of_0_leaves_out_counts_as_it_is_in_the_model(tmp_path: Path) -> None:
    case = CASES["FLUX.1"]
    pipe, path = shared_pipeline(case.family), tmp_path / "it.safetensors"
    written(case, "DoRA of inputs", pipe.transformer, path)
    names = case.layers["single_blocks.0.linear1"]
    whole = match(read_lora(path), pipe).model
    without = in_blocks(whole, {names[0]: 0.0})
    weights = [pipe.transformer.get_submodule(name).weight.double() for name in names]
    changed = [weights[0], *(w + whole[name].delta().double() for w, name in zip(weights[1:], names[1:], strict=True))]
    known = with_column_norms(without, modules_of(pipe.transformer), torch.device("cpu"), torch.float32)
    assert known.keys() == whole.keys() - {names[0]}
    for name in names[1:]:
        transform: Any = known[name].transform
        assert relative_error(transform.current.double(), torch.cat(changed).norm(dim=0)) < 1e-6


def test_merging_inspecting_and_the_joint_change_know_the_norms_of_several_layers(tmp_path: Path) -> None:
    case = CASES["FLUX.1"]
    pipe, path = shared_pipeline(case.family), tmp_path / "it.safetensors"
    dense = written(case, "DoRA of inputs", pipe.transformer, path)
    changes = {name: weight - pipe.transformer.get_submodule(name).weight for name, weight in dense.items()}
    factors = match(read_lora(path), pipe)

    by_layer, note = expressed(pipe, {("transformer", name): it for name, it in factors.model.items()}, "it")
    assert note is not None
    for name, change in changes.items():
        assert relative_error(by_layer["transformer", name].delta().double(), change) < 1e-5

    found, _ = inspect(read_lora(path), pipe, "small")
    whole = sum(float(change.square().sum()) for change in changes.values())
    assert sum((block.norm or 0) ** 2 for block in found.blocks) == pytest.approx(whole, rel=1e-4)

    twice = [Concept(name=name, lora=str(path), blocks=blocks) for name, blocks in (("a", None), ("b", {"text": 0.5}))]
    loaded = pipe.resolve_concepts(twice)
    joint = joint_change([loaded[0], loaded[1]], pipe.transformer)
    assert joint is not None
    assert joint.ratio == pytest.approx(2, rel=1e-4)
    together, alone = joint.by_layer["single_transformer_blocks.0.attn.to_k"]
    assert alone == pytest.approx(float(changes["single_transformer_blocks.0.attn.to_k"].norm()), rel=1e-4)
    assert together == pytest.approx(2 * alone, rel=1e-4)
