"""Whether an image can fit into memory at all, judged before anything is done."""

from pathlib import Path

import torch

from lora_compose.attention import Backbone, grid_at
from lora_compose.attention.device import dtype_of, is_linear, modules_of
from lora_compose.attention.fitting import shape_of
from lora_compose.attention.lora_bank import base_layer
from lora_compose.pipelines.calls.host import Host
from lora_compose.pipelines.support.notes import warn

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def check_size(backbone: Backbone, cell: int, device: torch.device, width: int, height: int, images: int = 1) -> None:
    """Checks that one pass of the model can fit into the memory of its device.

    Args:
        backbone: The call's backbone; its model needs no weights.
        cell: Side of a latent cell in pixels.
        device: Where the model runs.
        width: In pixels.
        height: In pixels.

    Raises:
        ValueError: For sizes that need more than all memory that there is.
    """
    there = memory_of(device)
    needed = least_bytes(backbone, (max(height, 0) // cell, max(width, 0) // cell), images)
    if there is not None and needed > there:
        some = f"{images} images of" if images > 1 else "an image of"
        raise ValueError(
            f"{some} {width} x {height} pixels cannot be made: one pass of the model needs at least "
            f"{_gib(needed)}, and the memory of {device} is {_gib(there)}; choose a smaller size"
        )


_FAR, _NEAR = 4, 1 / 16  # times the pixels that a model was made for


def warn_of_size(host: Host, width: int, height: int) -> None:
    """Warns of an image much larger or smaller than those that the model was made for, which look wrong."""
    own_width, own_height = host.own_size
    times = width * height / (own_width * own_height)
    if times >= _FAR or times < _NEAR:
        looks = "repeat subjects" if times > 1 else "lose their shapes"
        shown = f"{times:,.0f}" if times >= 10 else f"{times:.3g}"
        warn(
            f"{width} x {height} pixels are {shown} times those that this model was made for ({own_width} x "
            f"{own_height}): images {looks}. Without a size, it is the model's own"
        )


def least_bytes(backbone: Backbone, latent_grid: tuple[int, int], images: int = 1) -> int:
    """Memory that a pass of one row needs whatever saves memory: input and output of its largest layer.

    Attention is not counted, which fused kernels compute piece by piece, nor are weights, other rows and decoding.

    Args:
        latent_grid: Height and width of the latents.
        images: Images, of which latents, noise and prediction are kept.
    """
    modules, largest = modules_of(backbone.model), 0
    halved = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    size = 2 if halved else max(2, dtype_of(backbone.model).itemsize)
    # Feed-forward layers that diffusers runs piece by piece (`enable_forward_chunking`).
    chunked = tuple(f"{name}.ff." for name, module in modules.items() if module.__dict__.get("_chunk_size"))
    for name, site in backbone.sites.items():
        layer = base_layer(modules[name])
        if "image" not in site.parts or name.startswith(chunked):
            continue
        height, width = grid_at(latent_grid, site.level)
        cells = height * width
        if "reference" in site.parts:
            cells += height * width if site.reference_cells is None else site.reference_cells
        if is_linear(layer):
            largest = max(largest, cells * sum(shape_of(name, layer)))
        elif isinstance(layer, torch.nn.Conv2d):
            largest = max(largest, cells * (layer.in_channels + layer.out_channels))
    kept = 3 * 4 * images * latent_grid[0] * latent_grid[1]
    return size * (largest + kept)


def memory_of(device: torch.device) -> int | None:
    """All memory of a device in bytes, whoever uses it now; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type not in ("cpu", "mps"):
        return None
    import psutil  # which accelerate brings

    host = psutil.virtual_memory().total + psutil.swap_memory().total
    limit = _LIMIT.read_text().strip() if _LIMIT.exists() else "max"
    return min(host, int(limit)) if limit.isdecimal() else host


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
