"""Training of a base model whose saved weights are the average of the last ones."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from recipe.loop import Optimizers
from recipe.ranks import rank

NO_CAPTION = 0.1  # share of images without words, for classifier-free guidance
EMA = 0.998
CHECKED_AT = 10  # steps; outputs that begin as zero let gradients through by then
Batch = TypeVar("Batch")


class AveragedTrainer(ABC, Generic[Batch]):
    """Models that are trained together, with their optimizers and the running average of their weights.

    Args:
        models: What is trained, in place.
        is_inner: Whether a weight, by its name in `nn.ModuleList(models)`, is one for Muon; AdamW moves the rest.
        lr: Learning rate of Muon; AdamW has a tenth of it.
        seed: Seed of noise, times and dropped captions.
    """

    def __init__(
        self, models: Sequence[nn.Module], is_inner: Callable[[str, Tensor], bool], lr: float, seed: int
    ) -> None:
        self.models = nn.ModuleList(models).train()
        named = dict(self.models.named_parameters())
        self.parameters = list(named.values())
        self.average = [p.detach().clone() for p in self.parameters]
        inner = [name for name, p in named.items() if is_inner(name, p)]
        rest = [p for name, p in named.items() if name not in inner]
        self.optimizers = Optimizers([named[name] for name in inner], rest, lr, weight_decay=0.02)
        self.generator = torch.Generator().manual_seed(seed + 1000 * rank())
        self.step = 0

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""

    def learn(self, batch: Batch, share: float) -> float:
        """One step, with a share of the learning rate; returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        if self.step == CHECKED_AT:
            self._check_gradients()
        self.optimizers.step(share)
        self.step += 1
        kept = min(EMA, self.step / (self.step + 20))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - kept)
        return loss.item()

    def _check_gradients(self) -> None:
        """Raises ValueError if a weight gets no gradient, or one that is not finite, as compilers may have it."""
        lost = [
            name
            for name, weight in self.models.named_parameters()
            if weight.grad is None or not 0 < weight.grad.abs().sum() < float("inf")
        ]
        if lost:
            raise ValueError(f"{len(lost)} weights get no gradient, e.g. {lost[0]}")

    def state_dict(self) -> dict[str, Any]:
        """The state of a checkpoint."""
        return {
            "step": self.step,
            "models": self.models.state_dict(),
            "average": self.average,
            "optimizers": self.optimizers.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        self.step, self.average = state["step"], state["average"]
        self.models.load_state_dict(state["models"])
        self.optimizers.load_state_dict(state["optimizers"])
        if not rank():  # the others go on with noise of their own
            self.generator.set_state(state["generator"])

    def write(self, pipe: Any, parts: Iterable[nn.Module], out: Path) -> None:
        """Writes a pipeline with averaged weights in fp16; training may continue afterwards.

        Args:
            pipe: The pipeline around the models.
            parts: All of its models.
            out: The folder.
        """
        if rank():
            return
        parts, live = tuple(parts), [p.detach().clone() for p in self.parameters]
        self._set(self.average)
        for model in parts:
            model.half()
        pipe.save_pretrained(out)
        forget_origin(out)
        # Otherwise text encoders alone are opened in the precision of the file.
        for path in out.glob("text_encoder*/config.json"):
            path.write_text(path.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
        for model in parts:
            model.float()
        self._set(live)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def forget_origin(folder: Path) -> None:
    """Removes the paths of the original models from a saved pipeline."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
