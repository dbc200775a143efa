"""Runs the passes of a method without a model: counts their rows, for a plan (`CallPlan.cost`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_compose.attention import SitePart, grid_at
from lora_compose.pipelines.calls.resolved_call import CPU, ResolvedCall
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.control.prepared import PreparedControlNet
from lora_compose.pipelines.denoising.attention_log import AttentionLog
from lora_compose.pipelines.denoising.denoiser import check_pass
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss, MapRequest, Pass, Prediction
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.sampler import Sampler
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.encoder import EncodedText


@dataclass(frozen=True)
class CountingRunner:
    """A denoiser without a model; predictions are 0, and each map has a column of the image of its own.

    Attributes:
        canvas: Sizes, on the CPU.
        log: Records nothing.
    """

    resolved: ResolvedCall
    canvas: Canvas
    sampler: Sampler
    log: AttentionLog
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def of(cls, resolved: ResolvedCall) -> "CountingRunner":
        """The runner of all concept sets of a call."""
        canvas = resolved.canvas.on(CPU)
        with resolved.sampler.ahead() as sampler:
            return cls(resolved, canvas, sampler, AttentionLog(canvas, ()), Cost(row_factor=resolved.row_factor))

    def encode(
        self, weights: Tensor | None, prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None
    ) -> EncodedText:
        """Texts of the right length, without values."""
        tokens = self.resolved.sets[0].token_masks.trigger.shape[1]
        text = torch.zeros(self.resolved.canvas.images, tokens, 1)
        return EncodedText(text, text if self.resolved.cfg_scale > 1 else None)

    def of_set(self, concepts: ConceptSet, images: Sequence[int]) -> "CountingRunner":
        """The runner of one of several concept sets; costs are counted together."""
        canvas = self.canvas.of_prompts(len(images) // self.canvas.images_per_prompt)
        return replace(self, canvas=canvas, sampler=self.sampler.of_images(images), log=AttentionLog(canvas, ()))

    def ahead(self, sampler: Sampler) -> "CountingRunner":
        """The runner for steps of a draft."""
        return replace(self, sampler=sampler)

    @property
    def has_controlnet(self) -> bool:
        """Whether there is a ControlNet."""
        return any(isinstance(control, PreparedControlNet) for control in self.resolved.controls)

    @property
    def has_values(self) -> bool:
        """Maps have no values."""
        return False

    def fold(self, parts: Sequence[SitePart], weights: Sequence[float]) -> None:
        """Nothing is folded."""

    def prepare(self, spec: Pass, same_text_as: PreparedPass | None = None) -> PreparedPass:
        """Checks a pass, as the denoiser does."""
        check_pass(spec, self.canvas.backbone)
        return PreparedPass(spec)

    def predict(
        self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest | None = None
    ) -> Prediction:
        """Counts a forward pass."""
        text = prepared.spec.text if step.guided else prepared.spec.text.conditional()
        self.cost.rows_forward += self._rows(latents, step, text)
        latents = self.sampler.scaled(latents, step.t)  # schedulers such as Euler's warn if a step comes without it
        maps = None if request is None else self._maps(request)
        return Prediction(self._nothing(latents, text), text.roles, maps)

    def maps(self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest) -> AttentionMaps:
        """Counts a forward pass of the conditional rows that stops early."""
        self.cost.rows_stopped += self._rows(latents, step, prepared.spec.text.conditional())
        return self._maps(request)

    def gradient(self, latents: Tensor, step: Step, prepared: PreparedPass, wanted: MapLoss) -> Gradient:
        """Counts a pass with a gradient; the losses are 1, so that updates go on for as long as they may."""
        text = prepared.spec.text if wanted.whole and step.guided else prepared.spec.text.conditional()
        rows = self._rows(latents, step, text)
        if wanted.whole:
            self.cost.rows_forward += rows
        else:
            self.cost.rows_stopped += rows
        if prepared.spec.branch_batch_size is not None:  # then each micro-batch runs again, with a graph
            self.cost.rows_stopped += self._rows(latents, step, text)
        self.cost.rows_backward += text.rows
        maps = self._maps(wanted.request)
        prediction = Prediction(self._nothing(latents, text), text.roles, maps) if wanted.whole else None
        read = None if wanted.readout is None else wanted.readout(maps)
        return Gradient(torch.ones(len(latents)), torch.zeros(latents.shape), maps, prediction, read)

    def _rows(self, latents: Tensor, step: Step, text: Conditioning) -> float:
        """The rows of a pass, in latents of the whole canvas; those of ControlNets are counted."""
        fraction = latents.shape[-2] * latents.shape[-1] / math.prod(self.canvas.latent_grid)
        for control in self.resolved.controls:
            if isinstance(control, PreparedControlNet) and control.acts(step.index, step.count):
                self.cost.control_rows += len(text.roles.select(control.read_by(text))) * fraction
        return text.rows * fraction

    def _nothing(self, latents: Tensor, text: Conditioning) -> Tensor:
        return latents.new_zeros(text.rows, *latents.shape[1:])

    def _maps(self, request: MapRequest) -> AttentionMaps:
        """The nth map is 1 in the nth column of the image."""
        height, width = grid_at(self.canvas.latent_grid, self.canvas.map_level)
        *rows, _, count = request.tokens.shape
        columns = torch.arange(width) * count // width
        maps = (columns[:, None] == torch.arange(count)).float().expand(*rows, height, width, count).flatten(-3, -2)
        cells = torch.full((rows[-1], height * width, 1), 1.0).expand(-1, -1, height * width)
        return AttentionMaps(
            maps, cells if request.self_attention else None, None if request.output_layer is None else maps
        )
