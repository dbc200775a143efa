"""All of a model that must be the same after LoRAs have been in it."""

from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """All that must not change; the objects are held, so that no other can take over their identity."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.training = {name: module.training for name, module in self.modules.items()}
        self.hooks = {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in self.modules.items()
        }
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.bits = {name: tensor.detach().clone() for name, tensor in self.tensors.items() if not tensor.is_meta}
        self.facts = {name: (t.requires_grad, t.device, t.dtype) for name, t in self.tensors.items()}
        self.processors = {n: getattr(m, "processor", None) for n, m in self.modules.items()}
        scaling: dict[str, Any] = {n: getattr(m, "scaling", None) for n, m in self.modules.items()}
        self.scaling = {n: dict(found) for n, found in scaling.items() if isinstance(found, dict)}
        self.attributes = {name: set(vars(module)) for name, module in self.modules.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        for what in ("modules", "parameters", "buffers", "processors"):
            before, after = getattr(self, what), getattr(now, what)
            assert list(before) == list(after), what
            assert [name for name in before if before[name] is not after[name]] == [], what
        for what in ("training", "hooks", "facts", "scaling", "attributes"):
            assert getattr(self, what) == getattr(now, what), what
        assert [name for name, bits in self.bits.items() if not torch.equal(bits, now.bits[name])] == []
