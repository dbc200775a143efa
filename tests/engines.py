"""Folders and requests of serving engines, as docs/engines.md describes them."""

import json
import shutil
from pathlib import Path
from typing import Any

from lora_compose.compose.playground.assets import assets_dir

CUSTOM_PIPELINE = assets_dir() / "custom_pipeline"


def sglang_folder(model: Path, folder: Path, **further: Any) -> Path:
    """A copy of a model that names our pipeline, which SGLang opens without further arguments.

    Args:
        further: Entries of its model_index.json.
    """
    shutil.copytree(model, folder)
    shutil.copy(CUSTOM_PIPELINE / "pipeline.py", folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "CustomComposePipeline", **further}))
    return folder
