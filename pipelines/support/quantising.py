"""The ways to open a model in fewer bits, by name, and what they need: checked before anything slow is imported."""

import importlib.util

from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.spelling import did_you_mean

QUANTISED = {
    "fp8": "denoiser in 8 bits, with diffusers alone",
    "int8": "denoiser and large text encoders in 8 bits, with torchao",
    "nf4": "denoiser and large text encoders in 4 bits, with bitsandbytes on a GPU",
}
"""What each name means."""

GGUF, SAFETENSORS = ".gguf", ".safetensors"
_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", GGUF: "gguf"}


def is_file_of_weights(quantize: str) -> bool:
    """Whether `quantize` is a file of weights and not one of the names."""
    return quantize not in QUANTISED


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError for an unknown name, a file that is not there, or a package that is not installed."""
    if quantize is None:
        return
    path = expanded(quantize)
    suffix = path.suffix.lower()
    if is_file_of_weights(quantize):
        if suffix not in (GGUF, SAFETENSORS):
            near = did_you_mean(quantize, QUANTISED)
            raise ValueError(
                f"quantize is {quantize!r}; expected {', '.join(QUANTISED)}, or a file of the denoiser in fewer bits: "
                f"FILE.gguf, or FILE.safetensors in fp8{near}"
            )
        if not path.is_file():
            raise ValueError(f"there is no file {quantize!r}; quantize names a file of the denoiser on this machine")
    package = _PACKAGES.get(suffix if is_file_of_weights(quantize) else quantize)
    if package is not None and importlib.util.find_spec(package) is None:
        what = "a GGUF file" if package == "gguf" else quantize
        raise ValueError(f"{what} needs the package {package}: pip install {package}, or 'lora-compose[quantize]'")
