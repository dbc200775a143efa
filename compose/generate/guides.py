"""Reference images, control images and IP-Adapters of scene files, with their models."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from lora_compose.compose.files.paths import ModelError, is_hub_name
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.references import ReferencesPipeline
from lora_compose.pipelines.scene.mask_images import from_uri, greys, in_pixels, mask_of_box, on_white, open_image
from lora_compose.pipelines.scene.scene import ControlFile, IPAdapterFile, Scene
from lora_compose.pipelines.support.home import expanded

_KINDS = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}


def references_of(pipe: Any, scene: Scene) -> list[Image.Image]:
    """The reference images of a scene, in order. Raises ValueError if one is unreadable, or as `check_references`."""
    check_references(type(pipe), scene)
    return [on_white(open_image(path, "reference image")) for path in scene.references]


def check_references(family: type[ComposePipeline], scene: Scene) -> None:
    """Raises ValueError for images that a family reads in another way than a scene names them, or not at all.

    An image to start from is refused where the model would read it as a reference image.
    """
    reads = issubclass(family, ReferencesPipeline)
    if reads and scene.image is not None and scene.mask_image is None:
        starts = "starts from an image only with a mask: give one (mask_image, --mask-image)"
        how = "does not start from an image" if family.inpainting is None else starts
        raise ValueError(
            f"{family.family} {how}; if it is to be read as a reference image, give it as one (references, --reference)"
        )
    if scene.references and not reads:
        reading = ", ".join(each.family for each in ComposePipeline.families if issubclass(each, ReferencesPipeline))
        raise ValueError(f"reference images are read by {reading}, not by {family.family}; leave them out")


def controls_of(pipe: Any, given: Sequence[ControlFile], size: tuple[int, int]) -> list[Control]:
    """Opens the models and images of a scene's controls. ValueError if one is missing or of another kind.

    `size` is width and height of the image that is made; control images of its proportions are resized to it.
    """
    return [
        Control(
            model=_open(control.model, pipe.model.dtype, str(pipe._execution_device)),
            image=_resized(open_image(control.image, "control image").convert("RGB"), size),
            scale=control.scale, start=control.start, end=control.end, regions=dict(control.regions),
        )
        for control in given
    ]  # fmt: skip


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image in a size; one of other proportions as it is, which is refused when it is used."""
    same = abs(image.width * size[1] - image.height * size[0]) <= 0.02 * image.height * size[0]
    return image.resize(size, Image.Resampling.LANCZOS) if same else image


@lru_cache(maxsize=2)  # the next image of a run has the same ones
def _open(source: str, dtype: torch.dtype, device: str) -> Any:
    name = guide_source(source, "control model")
    try:
        config: Any = ControlNetModel.load_config(name)
        kind = _KINDS.get(config.get("_class_name"))
        if kind is not None:
            return kind.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"the control model {source!r} cannot be opened: {str(error)[:300]}") from error
    raise ModelError(
        f"{source!r} is a {config.get('_class_name')}; a control is a ControlNetModel or a T2IAdapter of diffusers"
    )


def guide_source(model: str, what: str) -> str:
    """Where a control model or an IP-Adapter is: a folder, or the name of a hub repository.

    Raises:
        ModelError: If it is neither.
    """
    path = expanded(model)
    if not path.exists() and not is_hub_name(model):
        raise ModelError(f"there is no {what} {model!r}; expected a folder or a hub repository")
    return str(path) if path.exists() else model


def fit_ip_adapters(pipe: Any, given: Sequence[IPAdapterFile]) -> None:
    """Loads the IP-Adapters of a scene, and unloads earlier ones. ValueError if that fails, or the family has none.

    They stay loaded, as concepts do, so that the next image with them does not read their files again.
    """
    wanted = tuple((adapter.model, adapter.subfolder, adapter.weight_name, adapter.image_encoder) for adapter in given)
    there = pipe.__dict__.get("scene_ip_adapters", ())
    if wanted != there:
        if there:
            pipe.unload_ip_adapter()
        pipe.__dict__["scene_ip_adapters"] = ()
        if wanted:
            _load_ip_adapters(pipe, given)
            pipe.__dict__["scene_ip_adapters"] = wanted
    if wanted:
        pipe.set_ip_adapter_scale([adapter.scale for adapter in given])


def _load_ip_adapters(pipe: Any, given: Sequence[IPAdapterFile]) -> None:
    if "unet" not in pipe.components or not hasattr(pipe, "load_ip_adapter"):
        raise ValueError(f"IP-Adapters work with Stable Diffusion 1.x, 2.x and XL, not with {pipe.family}")
    try:
        pipe.load_ip_adapter(
            [guide_source(adapter.model, "IP-Adapter") for adapter in given],
            subfolder=[adapter.subfolder for adapter in given],
            weight_name=[adapter.weight_name for adapter in given],
            image_encoder_folder=given[0].image_encoder,
        )
    except ModelError:
        raise
    except Exception as error:  # files of strangers, for which libraries raise many kinds of errors
        raise ModelError(f"the IP-Adapter {given[0].model!r} cannot be loaded: {str(error)[:300]}") from error


def ip_adapter_arguments(given: Sequence[IPAdapterFile], size: tuple[int, int]) -> dict[str, Any]:
    """A scene's IP-Adapters as arguments of a call. Raises ValueError for unreadable images and boxes outside."""
    if not given:
        return {}
    images = [on_white(open_image(adapter.image, "IP-Adapter image")) for adapter in given]
    arguments: dict[str, Any] = {"ip_adapter_image": images}
    if any(adapter.region is not None for adapter in given):
        processor = IPAdapterMaskProcessor()
        masks = [processor.preprocess(_mask(adapter.region, size), height=size[1], width=size[0]) for adapter in given]
        arguments["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return arguments


def _mask(region: Any, size: tuple[int, int]) -> Image.Image:
    if region is None:
        return Image.new("L", size, 255)
    if not isinstance(region, str):
        return mask_of_box(in_pixels(region, *size), *size)
    return greys(from_uri(region) if region.startswith("data:") else open_image(region, "mask"))


def plain_pipeline(pipe: Any, kind: Any, **components: Any) -> Any:
    """A pipeline of diffusers' own with the components of a pipeline, and others in their place or beside them."""
    options: dict[str, Any] = {"add_watermarker": False} if "XL" in type(pipe).__name__ else {}
    if "requires_safety_checker" in pipe.config:
        options["requires_safety_checker"] = pipe.config["requires_safety_checker"]
    plain = kind(**{**pipe.components, **components}, **options)
    plain.__dict__["_progress_bar_config"] = pipe.__dict__.get("_progress_bar_config", {})
    return plain


def pipeline_without_concepts(pipe: Any, scene: Scene, controls: Sequence[Control]) -> tuple[Any, dict[str, Any]]:
    """Diffusers' pipeline for ControlNets without concepts, and its arguments. ValueError for other controls."""
    if scene.image is not None or not all(isinstance(control.model, ControlNetModel) for control in controls):
        raise ValueError(
            "without concepts, controls are ControlNets and the image is made from text; leave out the start image and "
            "T2I-Adapters, or name concepts"
        )
    if any(control.regions for control in controls):
        raise ValueError("without concepts, a control has no scales by region; leave out its regions")
    kinds: dict[str, Any] = {
        "StableDiffusionPipeline": StableDiffusionControlNetPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLControlNetPipeline,
    }
    kind = kinds.get(type(pipe).__name__)
    if kind is None:
        raise ValueError(f"controls work with Stable Diffusion 1.x, 2.x and XL, not with {pipe.family}")
    plain = plain_pipeline(pipe, kind, controlnet=[control.model for control in controls])
    return plain, {
        "image": [control.image for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }
