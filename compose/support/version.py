"""The version of lora-compose."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-compose")
except PackageNotFoundError:  # run from a clone that has not been installed
    __version__ = "0.0.0"
