"""FLOPs that reference images add to a pass: they lie in its sequence beside text and image."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from lora_compose.attention.backbones import Backbone
from lora_compose.attention.device import is_linear, modules_of
from lora_compose.attention.fitting import shape_of
from lora_compose.attention.lora_bank import base_layer
from lora_compose.attention.sites import Grid, Site, SitePart, grid_at


def reference_factor(backbone: Backbone, latent_grid: Grid, tokens: int) -> float:
    """FLOPs of a row with reference images, relative to one without; 1 if the backbone reads none.

    Linear layers and attention are counted, without LoRAs.

    Args:
        latent_grid: Height and width of the latents.
        tokens: Tokens of the text.
    """
    joint = backbone.joint
    if joint is None or "reference" not in joint.parts:
        return 1.0
    modules, cells = modules_of(backbone.model), prod(grid_at(latent_grid, joint.level))
    positions: dict[SitePart, int] = {"text": joint.padded(tokens), "image": joint.padded(cells)}
    references = cells if joint.reference_cells is None else joint.reference_cells
    attends = getattr(backbone, "attends", ())
    without = _flops(backbone.sites, modules, joint, attends, {**positions, "reference": 0})
    return _flops(backbone.sites, modules, joint, attends, {**positions, "reference": references}) / without


def _flops(
    sites: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    joint: Site,
    attends: Sequence[tuple[str, tuple[SitePart, ...]]],
    positions: Mapping[SitePart, int],
) -> int:
    """FLOPs of one row, by positions of its parts; `attends`: parts of attention layers by their names' beginnings."""

    def length(site: Site) -> int:
        if "modulation" in site.parts:
            return len(site.parts)
        return sum(positions.get(part, 1) for part in site.parts)

    flops = 0
    for name, site in sites.items():
        if is_linear(layer := base_layer(modules[name])):
            flops += 2 * length(site) * prod(shape_of(name, layer))
    attention: Any = {name: module for name, module in modules.items() if hasattr(module, "set_processor")}
    for name, module in attention.items():
        parts = next((parts for start, parts in attends if name.startswith(start)), joint.parts)
        flops += 4 * length(joint.with_parts(*parts)) ** 2 * module.inner_dim
    return flops
