"""How LoRAs and attention are steered inside one forward pass of a denoiser.

This package knows torch, and nothing of prompts, methods or pipelines. Only `backbones` knows diffusers, which is
imported when a model of it is used.
"""

from typing import TYPE_CHECKING, Any

from lora_compose.attention.backbones import Backbone, backbone_of
from lora_compose.attention.bank_cache import Bank, BankCache, KeptBanks
from lora_compose.attention.claims import Claim
from lora_compose.attention.gates import Gates, scatter_concepts
from lora_compose.attention.gradients import frozen, weights_kept
from lora_compose.attention.install import Installation, bank_for, install, installed_bank, installed_layers
from lora_compose.attention.joint_regions import JointRegions
from lora_compose.attention.lora_bank import Lora, LoraFactors
from lora_compose.attention.norm_regions import NORM_APART, NormRegions
from lora_compose.attention.placing import How
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.reference_cost import reference_factor
from lora_compose.attention.regions import Partition, RegionAttention
from lora_compose.attention.sites import Grid, Site, SitePart, coarser, grid_at
from lora_compose.attention.text_bias import TextBias

if TYPE_CHECKING:
    from lora_compose.attention.backbones.step_caches import StepCaches, check_caches

__all__ = [
    "NORM_APART",
    "Backbone",
    "Bank",
    "BankCache",
    "Claim",
    "Gates",
    "Grid",
    "How",
    "Installation",
    "JointRegions",
    "KeptBanks",
    "Lora",
    "LoraFactors",
    "NormRegions",
    "Partition",
    "Recorder",
    "RegionAttention",
    "Site",
    "SitePart",
    "StepCaches",
    "TextBias",
    "backbone_of",
    "bank_for",
    "check_caches",
    "coarser",
    "frozen",
    "grid_at",
    "install",
    "installed_bank",
    "installed_layers",
    "reference_factor",
    "scatter_concepts",
    "weights_kept",
]


def __getattr__(name: str) -> Any:
    if name not in ("StepCaches", "check_caches"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_compose.attention.backbones import step_caches

    return getattr(step_caches, name)
