"""`train`: from a folder of images to a LoRA."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import nn

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.support.precision import cpu_has_bf16
from lora_compose.compose.training.bases import Base, base_of
from lora_compose.compose.training.batches import Batches, batches_of
from lora_compose.compose.training.checkpoint import finite, load_checkpoint, save_checkpoint
from lora_compose.compose.training.examples import squares
from lora_compose.compose.training.learner import Batch, Learner, Losses, Weights
from lora_compose.compose.training.model import cast, lora_parameters, open_base
from lora_compose.compose.training.optimizers import learning_rate, optimizers_of
from lora_compose.compose.training.output import lora_bytes
from lora_compose.compose.training.preparation import Adapter, CaptionedImages, adapt, encode, read_captioned
from lora_compose.compose.training.sampling import save_samples
from lora_compose.compose.training.settings import Training
from lora_compose.compose.training.stopping import stop_request

logger = logging.getLogger(__name__)

_WAIT = timedelta(days=1)
"""How long processes wait for the one that makes class images or samples."""
_PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OnStep = Callable[[int, float], None]
"""Called after every step with the number of finished steps and the loss; raising ends the training."""


class Stopped(KeyboardInterrupt):
    """The training was stopped by the user; the same command, without --fresh, resumes."""


class DivergedError(RuntimeError):
    """The loss or the weights are not finite; the last checkpoint is from before."""


def train(settings: Training, *, on_step: OnStep | None = None, fresh: bool = False, overwrite: bool = False) -> Path:
    """Trains a LoRA, or resumes a stopped training, and returns its path.

    `fresh` deletes a checkpoint and starts over; `overwrite` allows to replace an existing output.

    Raises:
        ValueError: For images, captions, words, models and checkpoints that cannot be used; nothing is trained then.
        FileExistsError: If the output exists.
        Stopped: After Ctrl-C; the same call, without `fresh`, resumes.
        DivergedError: If the loss is not finite.
        OSError: If a checkpoint or the output cannot be written.
    """
    if os.path.lexists(settings.out) and not overwrite:  # also a link that leads nowhere
        raise FileExistsError(f"{settings.out} exists already; choose another name, or overwrite it with --overwrite")
    accelerator = _accelerator(settings)
    with threads(settings.threads) if settings.threads else nullcontext():
        trainer = _prepare(settings, accelerator)
        if fresh:
            trainer.forget()
        trainer.run(trainer.resume(), on_step)
        return trainer.finish()


def _accelerator(settings: Training) -> Accelerator:
    if "WORLD_SIZE" not in os.environ:  # an earlier training of this process may have had another precision or device
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulate, cpu=settings.cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_WAIT)],
    )  # fmt: skip
    if settings.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "this CPU is slower in bf16 than in float32, many times where it has no instructions for it; use "
            "--mixed-precision no"
        )
    return accelerator


@dataclass(frozen=True, eq=False)
class _Trainer:
    """A training that is ready to run."""

    settings: Training
    accelerator: Accelerator
    base: Base
    adapter: Adapter
    learner: Any
    optimizers: Sequence[Any]
    batches: Batches
    captioned: CaptionedImages
    data: str

    @property
    def _weights(self) -> dict[str, nn.Parameter]:
        return dict(lora_parameters(self.base.network))

    def forget(self) -> None:
        """Deletes the checkpoint of an earlier training."""
        if self.accelerator.is_main_process:
            self.settings.checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the checkpoint, if there is one. Returns the number of finished steps."""
        if not self.settings.checkpoint.exists():
            return 0
        processes = self.accelerator.num_processes
        state = load_checkpoint(self.settings.checkpoint, self.settings, self.data, processes)
        with torch.no_grad():
            for name, parameter in self._weights.items():
                parameter.copy_(state["weights"][name])
        for optimizer, known in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        logger.info("resuming after step %d of %d", state["step"], self.settings.steps)
        return int(state["step"])

    def run(self, first: int, on_step: OnStep | None) -> None:
        settings = self.settings
        self.base.network.train()
        with stop_request() as request:
            for step in range(first, settings.steps):
                done, loss = step + 1, self._mean(self._step(step))
                if not math.isfinite(loss):
                    raise DivergedError(self._diverged(done, "the loss"))
                if on_step is not None and self.accelerator.is_main_process:
                    on_step(done, loss)
                stop = self._mean(float(request.received)) > 0  # all processes stop at the same step
                if stop or (done % settings.checkpoint_every == 0 and done < settings.steps):
                    self._save(done)
                if settings.sample_every and (done % settings.sample_every == 0 or done == settings.steps):
                    self._save_samples(done)
                if stop and done < settings.steps:
                    how = "run the same command to resume (without --fresh)"
                    raise Stopped(f"stopped after step {done} of {settings.steps}; {how}")

    def finish(self) -> Path:
        """Writes the LoRA and deletes the checkpoint."""
        settings = self.settings
        if self.accelerator.is_main_process:
            if not finite(list(self._weights.values())):
                raise DivergedError(self._diverged(settings.steps, "the LoRA"))
            try:
                write_whole(settings.out, lora_bytes(self.base, self.adapter.config, settings))
            except (OSError, SafetensorError) as error:  # the latter where there is no room for temporary files
                self._save(settings.steps)  # keeps the result, if there is room for it
                why = getattr(error, "strerror", None) or error
                raise OSError(
                    f"{settings.out} could not be written: {why}; all steps are done and kept in "
                    f"{settings.checkpoint}. Free some space; the same command, without --fresh, writes the file"
                ) from error
            settings.checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return settings.out

    def _step(self, step: int) -> float:
        """One optimisation step. Returns its loss, the mean over its batches."""
        total = torch.zeros((), device=self.accelerator.device)
        rate = learning_rate(self.settings, step)
        for part in range(self.settings.accumulate):
            batch = self.batches.of(step, part)
            with self.accelerator.accumulate(self.learner):
                losses: Losses = self.learner(_on(batch, self.accelerator.device))
                self.accelerator.backward(losses.total)
                if self.accelerator.sync_gradients and self.settings.max_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(self.learner.parameters(), self.settings.max_grad_norm)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    optimizer.step()
                    optimizer.zero_grad()
            total += losses.total.detach() / self.settings.accumulate
        return total.item()

    def _mean(self, number: float) -> float:
        """The mean of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return number
        value = torch.tensor([number], device=self.accelerator.device)
        return float(self.accelerator.reduce(value, reduction="mean"))  # pyright: ignore[reportArgumentType]

    def _save(self, done: int) -> None:
        if not self.accelerator.is_main_process:
            return
        weights = {name: parameter.detach().cpu() for name, parameter in self._weights.items()}
        if not finite(list(weights.values())):
            raise DivergedError(self._diverged(done, "the LoRA"))
        scaler = self.accelerator.scaler
        state = {
            "step": done,
            "weights": weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        processes = self.accelerator.num_processes
        save_checkpoint(self.settings.checkpoint, state, self.settings, self.data, processes)

    def _save_samples(self, done: int) -> None:
        if self.accelerator.is_main_process:
            samples, side = self.captioned.samples, self.captioned.side
            first = squares(self.captioned.images[0].references, side)
            save_samples(self.base, self.accelerator, self.settings, samples, self.adapter.focus, done, side, first)
        self.accelerator.wait_for_everyone()

    def _diverged(self, step: int, what: str) -> str:
        kept = (
            f" The checkpoint {self.settings.checkpoint} is from before." if self.settings.checkpoint.exists() else ""
        )
        half = "; fp16 overflows, bf16 does not" if self.settings.mixed_precision == "fp16" else ""
        return (
            f"{what} is not finite at step {step}: the training has diverged. Try a lower learning rate (it is "
            f"{self.settings.learning_rate:g}) or a longer warm-up, with --fresh{half}.{kept}"
        )


def _prepare(settings: Training, accelerator: Accelerator) -> _Trainer:
    base = base_of(open_base(settings.model))
    base.check(settings)
    if settings.preserve_empty and base.unconditional is None:
        raise ValueError(
            "preserve_empty keeps what unconditional rows of guidance read, and this model has none; use preserve_class"
        )
    noising, captioned = base.noising(settings), read_captioned(base, settings)
    # Text encoders and VAE, used once, stay in float32. A GPU may have no room for the network in it, nor for both.
    cast(base.network, _PRECISIONS[settings.mixed_precision])
    data = encode(base, captioned, settings, accelerator)
    base.network.to(accelerator.device)
    adapter = adapt(base, settings, data.rows)
    trained = {name: each for name, each in lora_parameters(base.network).items() if each.requires_grad}
    logger.info("%d parameters to train", sum(parameter.numel() for parameter in trained.values()))
    weights = Weights(settings.prior_weight, settings.tara.align_weight if settings.tara else 0.0, settings.min_snr)
    learner = Learner(base.network, noising, weights, adapter.focus, adapter.alignment, preserves=settings.preserves)
    learner, *optimizers = accelerator.prepare(learner, *optimizers_of(trained, settings))
    batches = batches_of(
        data.concept,
        data.prior,
        data.rows,
        seed=settings.seed,
        sizes=(settings.batch_size, settings.prior_batch or settings.batch_size),
        noising=noising,
        input_perturbation=settings.input_perturbation,
        accumulate=settings.accumulate,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
    )
    return _Trainer(settings, accelerator, base, adapter, learner, optimizers, batches, captioned, data.data)


def _on(batch: Batch, device: torch.device) -> Batch:
    moved = {name: value.to(device) for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    return batch._replace(**moved, added={name: value.to(device) for name, value in batch.added.items()})
