"""What the nodes need of ComfyUI, looked up before they are imported: an older version is told in words."""

from functools import reduce
from importlib import import_module

OLDEST = "0.3.64"
"""The oldest version of ComfyUI that the nodes are tested with."""

NEEDED = {
    "comfy.lora": ("model_lora_keys_unet",),
    "comfy.model_management": ("unload_all_models",),
    "comfy.model_patcher": tuple(
        f"ModelPatcher.{name}"
        for name in (
            "clone", "set_attachments", "get_attachment", "set_additional_models", "add_callback_with_key",
            "add_wrapper_with_key",
        )
    ),
    "comfy.patcher_extension": (
        "CallbacksMP.ON_EJECT_MODEL", "CallbacksMP.ON_INJECT_MODEL", "WrappersMP.SAMPLER_SAMPLE",
        "WrappersMP.APPLY_MODEL",
    ),
    "comfy.samplers": ("encode_model_conds", "KSampler.SAMPLERS", "KSampler.SCHEDULERS"),
    "comfy.sd": ("load_lora_for_models",),
    "comfy_api.latest": (
        "ComfyExtension", "io.ComfyNode", "io.Schema", "io.Custom", "io.NodeOutput", "ui.PreviewImage",
        "ui.PreviewText",
    ),
    "folder_paths": (
        "get_filename_list", "get_full_path_or_raise", "get_output_directory", "get_save_image_path",
    ),
    "nodes": ("common_ksampler",),
}  # fmt: skip
"""Names by module."""


def check_comfyui() -> None:
    """Raises RuntimeError if ComfyUI has not what the nodes need."""
    for module, names in NEEDED.items():
        for name in names:
            try:
                reduce(getattr, name.split("."), import_module(module))
            except (ImportError, AttributeError) as error:
                raise RuntimeError(
                    f"lora-compose needs ComfyUI {OLDEST} or later: this one has no {module}.{name}; update ComfyUI"
                ) from error
