"""What ComfyUI imports where a clone is in its custom_nodes, as ComfyUI Manager puts it there."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


async def comfy_entrypoint() -> Any:
    """Gives ComfyUI our nodes."""
    if find_spec("lora_compose") is None:
        sys.path.append(str(Path(__file__).parent))
    from lora_compose.compose.comfyui.entry import comfy_entrypoint as ours

    return await ours()
