"""Optimizers and the learning rate schedule."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_compose.compose.training.settings import Training

_MAGNITUDE = "lora_magnitude_vector"


def optimizers_of(parameters: Mapping[str, nn.Parameter], settings: Training) -> list[torch.optim.Optimizer]:
    """The optimizers of a training: AdamW for everything, or Muon for matrices and AdamW for convolutions.

    Muon (Jordan et al. 2024) makes every update a semi-orthogonal matrix. Scaled to the size that AdamW's updates have
    in long trainings (Liu et al., arXiv 2502.16982), so that both go with one learning rate; the first ones of AdamW
    are five times as large. Magnitudes of DoRA do not decay: they start at the norms of the model's own weights. Raises
    ValueError if this PyTorch has no Muon.
    """
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(_groups(parameters), lr, weight_decay=decay)]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer muon needs PyTorch 2.9 or newer, this is {torch.__version__}; use adamw")
    matrices = [parameter for parameter in parameters.values() if parameter.ndim == 2]
    others = {name: parameter for name, parameter in parameters.items() if parameter.ndim != 2}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(_groups(others), lr, weight_decay=decay))
    return optimizers


def _groups(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of weights for AdamW: those that decay, and magnitudes of DoRA, which do not."""
    magnitudes = [parameter for name, parameter in parameters.items() if _MAGNITUDE in name]
    others = [parameter for name, parameter in parameters.items() if _MAGNITUDE not in name]
    groups = [{"params": others}, {"params": magnitudes, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(settings: Training, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    done = max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[settings.schedule]
    return settings.learning_rate * warm * share
