"""How LoRAs and attention are steered inside one UNet call.

This package knows torch and diffusers' attention, and nothing of prompts, methods or pipelines.
"""

from lora_compose.attention.gates import Derived, Gates, among
from lora_compose.attention.install import Installation, check_free, install, installed_layers
from lora_compose.attention.layers import AttentionLayer, attention_layers, coarser, grid_at, map_level, places
from lora_compose.attention.layout import Layout, Partition
from lora_compose.attention.lora_bank import Lora, LoraFactors
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.stopping import frozen, stopped_after, weights_kept

__all__ = [
    "AttentionLayer",
    "Derived",
    "Gates",
    "Installation",
    "Layout",
    "Lora",
    "LoraFactors",
    "Partition",
    "Recorder",
    "among",
    "attention_layers",
    "check_free",
    "coarser",
    "frozen",
    "grid_at",
    "install",
    "installed_layers",
    "map_level",
    "places",
    "stopped_after",
    "weights_kept",
]
