"""T-LoRA that begins at singular vectors (arXiv 2507.05964): P diag(l) Q, minus what that was before training.

Files of sd-scripts' network for Anima hold both. Those of LyCORIS do not hold what is subtracted, which it makes again
from the model's weights.
"""

import math

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import Change, matrix
from lora_compose.pipelines.formats.kinds.kind import Kind, Shapes, Tensors, check_rank, columns, rows

_TRAINED, _BASE = ("q", "p", "lambda"), ("base_q", "base_p", "base_lambda")


def _sides(shapes: Shapes) -> tuple[int, int]:
    if missing := [slot for slot in (*_TRAINED, *_BASE) if slot not in shapes]:
        base = set(missing) & set(_BASE)
        raise ValueError(
            "it is a T-LoRA without its initial singular vectors (base_q, base_p, base_lambda), which have to be "
            "subtracted; LyCORIS recomputes them from the model's weights, which is not supported"
            if base
            else f"it has {', '.join(sorted(shapes))}, but no {' or '.join(missing)}; the file is incomplete"
        )
    rank, inputs, outputs = rows(shapes, "q"), columns(shapes, "q"), rows(shapes, "p")
    for q, p, factors in (_TRAINED, _BASE):
        sizes = rows(shapes, q), columns(shapes, q), rows(shapes, p), columns(shapes, p), math.prod(shapes[factors])
        if sizes != (rank, inputs, outputs, rank, rank) or 0 in sizes:
            listed = ", ".join(f"{slot} {list(shapes[slot])}" for slot in (*_TRAINED, *_BASE))
            raise ValueError(f"its tensors do not fit each other: {listed}")
    check_rank(rank, outputs, inputs)
    return outputs, inputs


def _factors(tensors: Tensors, _max_rank: int = 0, _products: bool = False) -> Change:
    """One LoRA of twice the rank, in which each trained rank stands before the one that is subtracted."""
    (down, up), (base_down, base_up) = (
        (matrix(tensors[q]), matrix(tensors[p]) * tensors[factors].flatten().float())
        for q, p, factors in (_TRAINED, _BASE)
    )
    return Change(
        LoraFactors(torch.stack([down, base_down], dim=1).flatten(0, 1), torch.stack([up, -base_up], dim=2).flatten(1))
    )


TLORA = Kind(
    "T-LoRA",
    {
        "q": r"\.q_layer\.weight",
        "p": r"\.p_layer\.weight",
        "lambda": r"\.lambda_layer",
        "base_q": r"\.base_q\.weight",
        "base_p": r"\.base_p\.weight",
        "base_lambda": r"\.base_lambda_buf",
    },
    _sides,
    factors=_factors,
    ranked=("q",),
    # Beside ordinary factors, in files of an early trainer.
    numbers={"least_rank": r"\.tlora_min_rank_state", "rank_schedule": r"\.tlora_rank_schedule_state"},
)
