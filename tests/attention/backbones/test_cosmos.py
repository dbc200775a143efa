"""A transformer with cross-attention reads a text for each region, and isolates regions, as a slow reference does."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from anima import cosmos_transformer
from lora_compose.attention import Gates, Lora, Partition, Recorder, RegionAttention, backbone_of, install
from lora_compose.attention.regions import queries_of
from transformer_families import random_lora_of_all

GRID, CELLS, TOKENS, ROWS = (6, 8), 12, 5, 2
# Columns of the 3 x 4 image tokens: the first region has two, the second two, one of them both; one has none.
COLUMNS = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.bool)
MEMBERSHIP = COLUMNS.expand(3, -1, -1).flatten(0, 1)
DRAW = torch.Generator().manual_seed(5)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, 2, generator=DRAW)


TEXTS = torch.randn(3, ROWS, TOKENS, 24, generator=DRAW)
QUERIES = queries_of(MEMBERSHIP)
GATES = Gates(
    drawn(3, ROWS, TOKENS), {1: drawn(ROWS, CELLS)}, drawn(ROWS), GRID, {1: drawn(ROWS, len(QUERIES[0]))}, drawn(ROWS),
    several_texts=True,
)  # fmt: skip


def gated(layer: nn.Module, loras: list[Lora], name: str, x: Tensor, gate: Tensor) -> Tensor:
    changes = [gate[..., i, None] * (x @ lora[name].delta().T) for i, lora in enumerate(loras)]
    return layer(x) + changes[0] + changes[1]


class Slow:
    """Attention of one layer, by scores of everything under masks; the text of a cell one by one."""

    def __init__(self, name: str, loras: list[Lora], isolate: bool) -> None:
        self.name, self.loras, self.isolate = name, loras, isolate

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        def of(part: str, x: Tensor, gate: Tensor) -> Tensor:
            return gated(attn.get_submodule(part), self.loras, f"{self.name}.{part}", x, gate)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        image = GATES.image[1]
        query = attn.norm_q(split(of("to_q", hidden_states, image)))
        if encoder_hidden_states is None:
            key = attn.norm_k(split(of("to_k", hidden_states, image)))
            turn: Any = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, use_real=True, use_real_unbind_dim=-2)
            query, key = turn(query), turn(key)
            none = ~MEMBERSHIP.any(dim=1)
            shared = (MEMBERSHIP[:, None] & MEMBERSHIP[None]).any(dim=-1)
            seen = shared | none[:, None] | none[None] if self.isolate else None
            out = F.scaled_dot_product_attention(query, key, split(of("to_v", hidden_states, image)), seen)
            return of("to_out.0", out.transpose(1, 2).flatten(2), image)
        read, outputs = GATES.read or {}, []
        for number, (text, cell) in enumerate(zip(*(found.tolist() for found in QUERIES), strict=True)):
            key = attn.norm_k(split(of("to_k", TEXTS[text], GATES.text[text])))
            value = split(of("to_v", TEXTS[text], GATES.text[text]))
            one = F.scaled_dot_product_attention(query[:, :, cell : cell + 1], key, value)
            outputs.append((cell, of("to_out.0", one.transpose(1, 2).flatten(2), read[1][:, number, None])))
        each = [torch.stack([out for at, out in outputs if at == cell]).mean(dim=0) for cell in range(CELLS)]
        return torch.cat(each, dim=1)


@pytest.mark.parametrize("isolate", [False, True])
@torch.no_grad()
def test_every_cell_reads_the_texts_of_its_regions_under_their_loras(isolate):
    model = cosmos_transformer()
    loras, backbone = [random_lora_of_all(model, seed) for seed in (0, 1)], backbone_of(model)
    latents, t = torch.randn(ROWS, 4, *GRID, generator=DRAW), torch.tensor(600.0)
    plain = backbone.forward(latents, t, TEXTS[0], None)
    regions = RegionAttention({1: Partition.of(MEMBERSHIP)}, True, isolate)
    recorder = Recorder(backbone.map_layers, torch.eye(TOKENS).expand(3, ROWS, -1, -1), backbone.self_map_layers)
    with install(backbone, loras, device=torch.device("cpu"), dtype=torch.float32) as installation:
        installation.use(installation.inputs(GATES, TEXTS, regions), recorder)
        found = backbone.forward(latents, t, TEXTS, None, several_texts=True)
    assert recorder.mean().shape == (3, ROWS, CELLS, TOKENS)
    torch.testing.assert_close(recorder.mean().sum(dim=-1), torch.ones(3, ROWS, CELLS))
    assert recorder.self_mean().shape == (ROWS, CELLS, CELLS)
    assert torch.equal(backbone.forward(latents, t, TEXTS[0], None), plain)

    def dense(name: str) -> Any:
        def add(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
            x, gate = given[0], GATES.image[1]
            if x.dim() == 2:
                gate = torch.as_tensor(GATES.modulation)
            elif x.dim() == 5:
                gate = gate.unflatten(1, (1, 3, 4))
            return output + sum(gate[..., i, None] * (x @ lora[name].delta().T) for i, lora in enumerate(loras))

        return add

    for name, module in model.named_modules():
        if name in loras[0] and ".attn" not in name:
            module.register_forward_hook(dense(name))
        elif name.endswith((".attn1", ".attn2")):
            module.set_processor(Slow(name, loras, isolate))  # pyright: ignore[reportCallIssue]
    expected = backbone.forward(latents, t, TEXTS[0], None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 0.1
