"""Options with which diffusers opens a model in fewer bits: by a name such as nf4, or with a file of the denoiser."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import BFLQuantizationConfig, DiffusionPipeline, GGUFQuantizationConfig, PipelineQuantizationConfig

from lora_compose.pipelines.families.fp8_files import float8_checkpoint
from lora_compose.pipelines.families.opening import configuration
from lora_compose.pipelines.formats.models import model_part, models_by_part
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.quantising import GGUF, check_quantize, is_file_of_weights

logger = logging.getLogger(__name__)
OpenedPipeline = TypeVar("OpenedPipeline", bound=DiffusionPipeline)

SMALL_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""Text encoders that are not quantised: of at most 1.4 GB in half precision."""
_PREFIX = "model.diffusion_model."  # of denoisers in whole checkpoints


def quantised_components(config: Mapping[str, Any], quantize: str) -> tuple[str, ...]:
    """The components that are in fewer bits: the denoiser, and with `int8` and `nf4` text encoders other than CLIP's.

    Args:
        config: The content of `model_index.json`.
    """
    denoiser = _denoiser(config)
    if is_file_of_weights(quantize) or quantize == "fp8":
        return (denoiser,)
    texts = [name for name, value in config.items() if name.startswith("text_encoder") and isinstance(value, list)]
    return (denoiser, *(name for name in texts if config[name][1] not in (None, *SMALL_TEXT_ENCODERS)))


def quantising_options(quantize: str | None, source: str, options: Mapping[str, Any], **hub: Any) -> dict[str, Any]:
    """Further options of `from_pretrained` for a model in fewer bits.

    Args:
        quantize: nf4, int8, fp8, or a file of the denoiser: GGUF, or safetensors in fp8; None asks for nothing.
        source: A folder or hub repository.
        options: Options that were given.
        hub: Options with which the repository is read.

    Raises:
        ValueError: For an unknown name, a missing file or package, nf4 without a GPU, and a component or configuration
            that was given as well.
    """
    if quantize is None:
        return {}
    check_quantize(quantize)
    config = configuration(source, **hub)
    names = quantised_components(config, quantize)
    if twice := options.keys() & {"quantization_config", *names}:
        raise ValueError(
            f"quantize={quantize!r} and {', '.join(sorted(twice))} are for the same layers; give one of them"
        )
    logger.info("%s: %s", quantize, ", ".join(names))
    dtype = options.get("dtype", options.get("torch_dtype")) or torch.float32
    if is_file_of_weights(quantize):
        return {names[0]: _from_file(expanded(quantize), source, config, names[0], dtype, hub)}
    if quantize == "fp8":
        return {}
    mapping = {name: _configuration(quantize, config[name][0], dtype) for name in names}
    given = {} if "torch_dtype" in options else {"dtype": dtype}  # else the libraries would choose another
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping), **given}


def cast(pipe: OpenedPipeline, quantize: str | None) -> OpenedPipeline:
    """A pipeline as it was opened; for fp8 its denoiser is in float8 while layers do not run (layerwise casting)."""
    if quantize == "fp8":
        _cast(models_by_part(pipe)[model_part(pipe)])
    return pipe


def check_of_one_file(quantize: str | None) -> None:
    """Raises ValueError for what a whole model in one file cannot be opened with."""
    check_quantize(quantize)
    if quantize not in (None, "fp8"):
        raise ValueError(
            f"a model in one file is opened with quantize='fp8' or without; for {quantize}, name its folder or hub "
            "repository"
        )


def _cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)


def _denoiser(config: Mapping[str, Any]) -> str:
    return "unet" if "unet" in config else "transformer"


def _configuration(quantize: str, library: str, dtype: torch.dtype) -> Any:
    """The configuration of one component, of diffusers or of transformers."""
    of: Any = transformers if library == "transformers" else diffusers
    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

        return of.TorchAoConfig(Int8WeightOnlyConfig())
    if not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()):
        raise ValueError(
            "nf4 needs a GPU, since diffusers opens models of bitsandbytes on one only; on a CPU use int8, fp8 or a "
            "GGUF file"
        )
    return of.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _from_file(
    path: Path, source: str, config: Mapping[str, Any], name: str, dtype: torch.dtype, hub: Mapping[str, Any]
) -> Any:
    """A denoiser from one file, with the configuration of a model's own."""
    kind = getattr(diffusers, config[name][1])
    how: dict[str, Any] = {"config": source, "subfolder": name, "dtype": dtype, "config_revision": hub.get("revision")}
    how |= {option: hub[option] for option in ("local_files_only", "token") if option in hub}
    if path.suffix.lower() == GGUF:
        return kind.from_single_file(str(path), quantization_config=GGUFQuantizationConfig(dtype), **how)
    tensors, scaled = float8_checkpoint(path, dtype, "" if name == "unet" else _PREFIX)
    if scaled:
        return kind.from_single_file(tensors, quantization_config=BFLQuantizationConfig(dtype), **how)
    model = kind.from_single_file(tensors, **how)
    _cast(model)
    return model
