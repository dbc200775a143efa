"""What `with_kernel` relies on in diffusers: an attention processor ends in one call of `dispatch_attention_fn`."""

import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any, cast

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from all_transformers import TRANSFORMERS
from anima import cosmos_transformer
from chroma import chroma_transformer
from flux import flux_transformer
from flux2 import flux2_transformer
from flux3 import flux3_transformer
from ideogram4 import ideogram4_transformer
from krea2 import krea2_transformer
from lora_compose.attention import Gates, Recorder, Site, install
from lora_compose.attention.backbones import backbone_of
from lora_compose.attention.backbones.flux2 import Flux2Backbone
from lora_compose.attention.backbones.joint import with_kernel
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_kernel import JointKernel
from qwen_image import qwen_image_transformer
from transformer_families import CALL, Family, plain_latents, random_lora_of_all
from z_image import z_image_transformer

MODELS = {
    "anima": cosmos_transformer,
    "chroma": chroma_transformer,
    "flux": flux_transformer,
    "flux2": flux2_transformer,
    "flux3": flux3_transformer,
    "ideogram4": ideogram4_transformer,
    "krea2": krea2_transformer,
    "qwen-image": qwen_image_transformer,
    "z-image": z_image_transformer,
}


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def attention_layers(model: nn.Module) -> Mapping[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}


def test_the_dispatch_takes_queries_keys_values_and_a_mask_first():
    first = list(inspect.signature(dispatch_attention_fn).parameters)[:4]
    assert first == ["query", "key", "value", "attn_mask"]
    assert list(inspect.signature(JointKernel.__call__).parameters)[1:5] == first


def test_processors_are_plain_functions_that_find_the_dispatch_among_the_names_of_their_module(family):
    layers = attention_layers(MODELS[family]())
    assert layers
    for layer in layers.values():
        call: Any = type(layer.processor).__call__
        assert isinstance(call, FunctionType)
        assert "dispatch_attention_fn" in call.__code__.co_names
        assert call.__globals__["dispatch_attention_fn"] is dispatch_attention_fn
        assert not hasattr(call, "__wrapped__"), "a decorator would be copied, not what it decorates"


def defaults(function: Any) -> list[tuple[str, Any]]:
    return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]


def test_a_copy_has_the_state_of_the_processor_which_stays_as_it_was(family):
    model = MODELS[family]()
    backbone: Any = backbone_of(model)
    state = ForwardState()
    for name, layer in attention_layers(model).items():
        layer.processor._attention_backend = "native"
        before = dict(vars(layer.processor))
        call: Any = type(layer.processor).__call__
        made = with_kernel(layer.processor, JointKernel, name, backbone.joint or Site("image", level=1), state)
        assert isinstance(made, type(layer.processor))
        assert vars(made) == before == vars(layer.processor)
        assert type(layer.processor).__call__ is call
        assert call.__globals__["dispatch_attention_fn"] is dispatch_attention_fn
        ours, theirs = (inspect.signature(one).parameters for one in (type(made).__call__, call))  # diffusers looks
        assert [(one.name, one.default) for one in ours.values()] == [
            (one.name, one.default) for one in theirs.values()
        ]


class Counted:
    """A kernel that counts its calls and the arguments they have."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls.append((query.dim(), set(options)))
        return self.kernel(query, key, value, **options)


def test_every_layer_attends_through_our_kernel_once_in_a_pass_with_the_same_bits(family):
    described: Family = TRANSFORMERS[family]
    pipe = described.pipeline()
    given = {**CALL, "num_inference_steps": 1, **described.unguided}
    expected = plain_latents(described, pipe, **given)
    backbone: Any = backbone_of(pipe.transformer)
    state, kernels = ForwardState(), {}
    for name, layer in attention_layers(pipe.transformer).items():
        made = with_kernel(layer.processor, JointKernel, name, backbone.joint or Site("image", level=1), state)
        call: Any = type(made).__call__
        names = call.__globals__
        kernels[name] = names["dispatch_attention_fn"] = Counted(names["dispatch_attention_fn"])
        layer.set_processor(made)
    assert torch.equal(plain_latents(described, pipe, **given), expected)
    for name, kernel in kernels.items():
        if "image_cond" in name:  # which runs only if there are reference images
            assert not kernel.calls
            continue
        assert len(kernel.calls) == 1, name
        ((dimensions, options),) = kernel.calls
        assert dimensions == 4, "rows, positions, heads, channels"
        chosen = set() if family == "anima" else {"backend"}  # diffusers does not offer it for Cosmos
        assert {"attn_mask"} | chosen <= options


@torch.no_grad()
def test_a_pass_that_stops_after_a_layer_computes_the_same_up_to_it(family):
    described: Family = TRANSFORMERS[family]
    pipe, given, outputs = described.pipeline(), [], {}
    model, backbone = pipe.transformer, cast(Any, backbone_of(pipe.transformer))
    hook = model.register_forward_pre_hook(lambda _, args, named: given.append((args, named)), with_kwargs=True)
    plain_latents(described, pipe, **{**CALL, "num_inference_steps": 1, **described.unguided})
    hook.remove()
    kinds = tuple(f"{kind}." for kind in backbone.blocks)
    layers = [name for name in attention_layers(model) if name.startswith(kinds)]
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda _, __, made, name=name: outputs.update({name: made}))
    args, named = given[0]
    model(*args, **named)
    whole = dict(outputs)
    assert whole.keys() == set(layers)
    for last in layers:
        outputs.clear()
        with backbone.truncated_after([last]):
            model(*args, **named)
        assert last in outputs
        for name, made in outputs.items():
            torch.testing.assert_close(made, whole[name], atol=0, rtol=0)


class WithoutDispatch:
    """A processor that attends by itself."""

    def __call__(self, attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states


class Builtin:
    """A processor that is not a function of Python."""

    __call__ = print


@pytest.mark.parametrize("processor", [WithoutDispatch(), Builtin()])
def test_a_processor_without_the_dispatch_is_refused(processor):
    backbone: Any = backbone_of(flux_transformer())
    with pytest.raises(ValueError, match=f"layer has a {type(processor).__name__}, which cannot be combined"):
        with_kernel(processor, JointKernel, "layer", backbone.joint, ForwardState())


@torch.no_grad()
def test_loras_are_gated_by_part_in_a_sequence_with_reference_images_of_other_sizes():
    """Against dense deltas: each position of text and image has a factor of its own, references have none."""
    model = flux2_transformer()
    loras = [random_lora_of_all(model, seed) for seed in (0, 1)]
    draw = torch.Generator().manual_seed(4)
    text, image = torch.rand(1, 5, 2, generator=draw), torch.rand(1, 12, 2, generator=draw)
    references = torch.zeros(1, 4 + 6, 2)  # of two images, 2 x 2 and 2 x 3 tokens
    gates = Gates(text, {1: image}, torch.zeros(1, 2), (6, 8), further={"reference": references})
    ids = torch.nn.functional.pad(torch.arange(22)[:, None], (1, 2))
    given = {
        "hidden_states": torch.randn(1, 22, 16, generator=draw), "timestep": torch.tensor([0.4]), "guidance": None,
        "encoder_hidden_states": torch.randn(1, 5, 72, generator=draw), "img_ids": ids, "txt_ids": ids[:5],
        "return_dict": False,
    }  # fmt: skip

    def dense(name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = inputs
            parts = {5: [text], 22: [image, references], 27: [text, image, references]}.get(x.shape[1])
            if x.dim() == 2 or parts is None:
                return output
            gate = torch.cat(parts, dim=1)
            change = [gate[..., i, None] * (x @ lora[name].delta().T) for i, lora in enumerate(loras)]
            return output + change[0] + change[1]

        return add

    hooks = [model.get_submodule(name).register_forward_hook(dense(name)) for name in loras[0]]
    expected = model(**given)[0]
    for hook in hooks:
        hook.remove()
    backbone = Flux2Backbone(model, reference=True)
    words = torch.eye(5)[None]
    recorder = Recorder(backbone.map_layers, words)
    with install(backbone, loras, device=torch.device("cpu"), dtype=torch.float32) as installation:
        installation.use(installation.inputs(gates, given["encoder_hidden_states"]), recorder)
        found = model(**given)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - model(**given)[0]).abs().max() > 0.01
    assert recorder.mean().shape == (1, 12, 5), "queries are the cells of the image"
    assert 0 < recorder.mean().sum(dim=-1).max() < 1, "references stay in the softmax"
