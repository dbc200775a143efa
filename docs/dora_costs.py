"""What DoRA adds to a forward pass, beside plain LoRAs and PEFT's, counted without weights on SD 1.5's structure.

Run: python docs/dora_costs.py
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from lora_compose.attention import Gates, Lora, backbone_of, grid_at, install
from lora_compose.attention.transforms import Rescaling
from lora_compose.compose.benchmark.architectures import RANK, attention_lora, without_weights
from lora_compose.compose.benchmark.host import operations
from lora_compose.compose.support.terminal import out

GRID, TOKENS, ROWS = (64, 64), 77, 2
META = torch.device("meta")


def cost(loras: Sequence[Lora], unet: Any) -> tuple[int, int]:
    """FLOPs and operations of a pass with gates by row, token and cell, or of the plain pass without LoRAs."""
    gates = Gates(
        torch.empty(ROWS, TOKENS, len(loras), device=META),
        {level: torch.empty(ROWS, _cells(level), len(loras), device=META) for level in range(4)},
        torch.empty(ROWS, len(loras), device=META),
        GRID,
    )
    inputs = _inputs(unet)
    backbone = backbone_of(unet)
    with install(backbone, loras, device=META, dtype=torch.float32) if loras else nullcontext() as there:
        if there is not None:
            there.use(there.inputs(gates, inputs["encoder_hidden_states"]))
            unet(**inputs)  # keys and values of the text are made once
        return _counted(lambda: unet(**inputs))


def cost_of_peft(number: int, dora: bool, unet: Any) -> tuple[int, int]:
    """Operations and FLOPs of the pass with PEFT adapters, ungated."""
    unet = copy.deepcopy(unet)
    names = [f"a{i}" for i in range(number)]
    for name in names:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        with META:
            unet.add_adapter(LoraConfig(r=RANK, target_modules=targets, use_dora=dora), name)
    unet.set_adapters(names)
    unet.eval().requires_grad_(False)
    inputs = _inputs(unet)
    return _counted(lambda: unet(**inputs))


def as_dora(lora: Lora) -> Lora:
    """Low-rank factors with DoRA magnitudes."""
    return {name: replace(it, transform=Rescaling(torch.empty(len(it.up), device=META))) for name, it in lora.items()}


def _counted(function: Callable[[], object]) -> tuple[int, int]:
    counter: AbstractContextManager[Any] = FlopCounterMode(display=False)
    with torch.no_grad():
        with counter as flops:
            function()
        return flops.get_total_flops(), operations(function)


def _cells(level: int) -> int:
    height, width = grid_at(GRID, level)
    return height * width


def _inputs(unet: Any) -> dict[str, Any]:
    return {
        "sample": torch.empty(ROWS, unet.config.in_channels, *GRID, device=META),
        "timestep": torch.empty((), device=META),
        "encoder_hidden_states": torch.empty(ROWS, TOKENS, unet.config.cross_attention_dim, device=META),
        "return_dict": False,
    }


def rows() -> list[list[str]]:
    """The rows of the table in `lora-files.md`."""
    unet = without_weights("SD 1.x").unet.eval().requires_grad_(False)
    plain_flops, plain_operations = cost([], unet)
    lora = {
        name: replace(factors, down=factors.down.to(META), up=factors.up.to(META))
        for name, factors in attention_lora(unet).items()
    }
    found = []
    for number in (1, 4):
        for name, (flops, count) in {
            "LoRA, gated": cost([lora] * number, unet),
            "DoRA, gated": cost([as_dora(lora)] * number, unet),
            "PEFT's LoRA": cost_of_peft(number, False, unet),
            "PEFT's DoRA": cost_of_peft(number, True, unet),
        }.items():
            added = f"{flops / plain_flops - 1:.1%}".replace("%", " %")
            found.append([name, str(number), added, str(count - plain_operations)])
    return found


def main() -> None:
    """Prints the table."""
    table = Table("", "LoRAs", "FLOPs added", "operations added")
    for row in rows():
        table.add_row(*row)
    out.print(table)


if __name__ == "__main__":
    main()
