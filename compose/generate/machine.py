"""Devices, threads and versions on which images depend."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from lora_compose.compose.files.images import Machine
from lora_compose.compose.support.version import __version__

PACKAGES = ("torch", "diffusers", "transformers")

_DEVICES = re.compile(r"(cpu|mps|(cuda|xpu)(:\d+)?)")


def choose_device(name: str | None) -> str:
    """Checks a device; None chooses an accelerator if there is one. Raises ValueError if it is unknown or missing."""
    there = devices()
    if name is None:
        return there[0]
    if not _DEVICES.fullmatch(name):
        raise ValueError(f"unknown device {name!r}; expected cpu, cuda, cuda:0, mps or xpu")
    if name not in there:
        raise ValueError(f"this machine has no device {name!r}; it has {', '.join(there)}")
    return name


def devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    there = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            there += [kind, *(f"{kind}:{number}" for number in range(module.device_count()))]
    return [*there, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def versions() -> dict[str, str]:
    """The versions that an image may depend on, by package."""
    ours = {"lora-compose": __version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}


def machine(device: torch.device | str) -> Machine:
    """Facts about a device on which an image may depend."""
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(device=str(device), name=name, threads=torch.get_num_threads())


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Sets the number of CPU threads inside this block, at most the number of processors; pixels depend on it."""
    before = torch.get_num_threads()
    if number <= (os.cpu_count() or 1):
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
