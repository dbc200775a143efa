"""What ComfyUI imports and calls to get the nodes."""

from typing import Any

from lora_compose.compose.comfyui.needed import check_comfyui


async def comfy_entrypoint() -> Any:
    """The list of nodes. Raises RuntimeError if ComfyUI has not what they need."""
    check_comfyui()
    from lora_compose.compose.comfyui.nodes import Extension

    return Extension()
