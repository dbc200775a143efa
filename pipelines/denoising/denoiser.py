"""The only way to run the denoiser during a call; it counts what it costs.

A method prepares its passes once (`prepare`) and runs them in every step: `predict` for what the scheduler takes,
`maps` for attention maps alone, `gradient` for the gradient of a loss on attention maps with respect to the latents.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import Backbone, Installation, Recorder, SitePart, StepCaches, frozen, weights_kept
from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.control.image_prompts import PreparedImagePrompts
from lora_compose.pipelines.control.prepared import PreparedControl, PreparedControlNet, View, model_inputs
from lora_compose.pipelines.denoising.attention_log import AttentionLog
from lora_compose.pipelines.denoising.inputs import check_marked, for_rows, of_images
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss, MapRequest, Pass, Prediction
from lora_compose.pipelines.denoising.prepared_pass import KeptText, MicroBatch, PreparedPass
from lora_compose.pipelines.denoising.sampler import Sampler
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.text.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class _Differentiated:
    """A pass to differentiate; latents are scaled for the model."""

    scaled: Tensor
    step: Step
    batches: Sequence[MicroBatch]
    recorder: Recorder
    of: MapLoss


class Denoiser:
    """Runs the passes of one concept set.

    Args:
        sampler: The scheduler, which scales latents for the model.
        controls: Prepared ControlNets, T2I-Adapters and images of IP-Adapters.
        inputs: Further arguments of every forward pass; tensors are marked (`ByImage`, `OnGrid`).

    Attributes:
        cost: Rows that have been run so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        installation: Installation,
        sampler: Sampler,
        canvas: Canvas,
        concepts: ConceptSet,
        controls: Sequence[PreparedControl | PreparedImagePrompts],
        inputs: Mapping[str, Any],
        log: AttentionLog,
        caches: StepCaches,
    ) -> None:
        self.backbone = backbone
        self.installation = installation
        self.sampler = sampler
        self.canvas = canvas
        self.concepts = concepts
        self.controls = tuple(controls)
        check_marked(inputs)
        self.inputs = dict(inputs)
        self.log = log
        self.caches = caches
        self.cost = Cost()
        self.has_values = True
        self._can_fold = True

    def of_set(self, concepts: ConceptSet, images: Sequence[int]) -> "Denoiser":
        """The denoiser of one of several concept sets, with these images of the batch; costs are counted together."""
        columns = concepts.columns or range(len(concepts.loaded))
        part = Denoiser(
            self.backbone, self.installation, self.sampler.of_images(images),
            self.canvas.of_prompts(len(images) // self.canvas.images_per_prompt), concepts,
            [control.of_images(images) for control in self.controls], of_images(self.inputs, images),
            self.log.of_set(columns, len(self.concepts.loaded), images), self.caches,
        )  # fmt: skip
        part.cost = self.cost
        part._can_fold = False
        return part

    def ahead(self, sampler: Sampler) -> "Denoiser":
        """The denoiser for a draft with a sampler of its own: its rows count, but they are not recorded."""
        ahead = copy(self)
        ahead.sampler, ahead.log = sampler, AttentionLog(self.canvas, ())
        return ahead

    @property
    def has_controlnet(self) -> bool:
        """Whether there is a ControlNet, which reads a text for the whole image."""
        return any(isinstance(control, PreparedControlNet) for control in self.controls)

    def fold(self, parts: Sequence[SitePart], weights: Sequence[float]) -> None:
        """Adds LoRAs with constant gates to the weights for the rest of the call; they then run at base speed.

        Call it before the first pass. Concepts that change over the steps (weight schedules, T-LoRAs) stay in the bank,
        and with several concept sets all do: gates that are constant in one set are not in the others.

        Args:
            parts: Parts of sequences whose gates are the same on all rows and positions.
            weights: The gate of each concept.
        """
        joint = self.backbone.joint
        acts = [bool(concept.references) for concept in self.concepts.concepts]
        if joint is not None and joint.reference_cells is not None and not all(acts):
            parts = [part for part in parts if part != "reference"]
        if self._can_fold and parts:
            self.installation.fold(parts, weights, self.concepts.changing)

    def prepare(self, spec: Pass, same_text_as: PreparedPass | None = None) -> PreparedPass:
        """Prepares a pass, to be run in every step.

        Args:
            same_text_as: A pass with the same text under the same text gates, whose keys and values are shared.

        Raises:
            ValueError: If the denoiser does not support region attention, or for a bias beside it.
        """
        check_pass(spec, self.backbone)
        if spec.norm_regions is not None:
            self.installation.normalise_by_region()
        kept = KeptText() if same_text_as is None else same_text_as.kept_text
        # Texts of regions in one sequence have lost their padding already.
        hidden = self.backbone.hides_padding and spec.joint_regions is None
        end = spec.text.end if hidden else None
        return PreparedPass(spec, kept, apart=self.backbone.unconditional_apart, end=end)

    def predict(
        self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest | None = None
    ) -> Prediction:
        """One forward pass.

        Args:
            latents: Shape: [images, channels, height, width].
            request: Attention maps to record as well, for the rows that are run.
        """
        batches = self.micro_batches(prepared, step, conditional=not step.guided)
        text = self._text(prepared, conditional=not step.guided)
        logged = self.log.request(step.index, text)
        recorders = [None if asked is None else self._recorder(asked) for asked in (logged, request)]
        active = [recorder for recorder in recorders if recorder is not None]
        output = self._run(self.sampler.scaled(latents, step.t), step, prepared.spec, batches, active, whole=True)
        if recorders[0] is not None:
            self.log.take(step.index, prepared.spec, text, recorders[0].mean())
        maps = None if recorders[1] is None else AttentionMaps.of(recorders[1])
        return Prediction(output, text.roles, maps)

    def maps(self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest) -> AttentionMaps:
        """Attention maps alone: a forward pass of the conditional rows that stops after the last map layer.

        Args: as for `predict`; the request is for conditional rows.
        """
        recorder, batches = self._recorder(request), self.micro_batches(prepared, step, conditional=True)
        self._run(self.sampler.scaled(latents, step.t), step, prepared.spec, batches, [recorder], whole=False)
        return AttentionMaps.of(recorder)

    def gradient(self, latents: Tensor, step: Step, prepared: PreparedPass, wanted: MapLoss) -> Gradient:
        """The gradient of a loss on attention maps with respect to the latents.

        It is taken with respect to the scaled latents that the model gets, and returned in the scale of `latents`. So
        one step size fits all schedulers; with those that scale the input down (Euler), steps would be too small.

        One graph exists at a time, without gradients of weights: of all rows, or of one micro-batch, which then runs
        twice. The host waits for the device once. Raises RuntimeError under `torch.inference_mode`, which has no
        gradients, and ValueError if the gradient is not finite.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("this method needs gradients: call it outside torch.inference_mode()")
        gradient = self.differentiate(latents, step, prepared, wanted)
        further = gradient.losses.new_empty(0) if wanted.readout is None else wanted.readout(gradient.maps)
        known = [gradient.losses, gradient.direction.isfinite().all()[None], further.flatten()]
        losses, finite, read = torch.cat(known).cpu().split([len(values) for values in known])
        if not finite:
            raise ValueError(f"the gradient at step {step.index} is not finite; try float32 or a smaller step size")
        return replace(gradient, losses=losses, readout=None if wanted.readout is None else read.view(further.shape))

    def differentiate(self, latents: Tensor, step: Step, prepared: PreparedPass, wanted: MapLoss) -> Gradient:
        """`gradient` without the check and without a host wait; losses stay on the denoiser's device."""
        conditional = not (wanted.whole and step.guided)
        batches = self.micro_batches(prepared, step, conditional=conditional)
        text, scaled = self._text(prepared, conditional), self.sampler.scaled(latents, step.t)
        per_latent = self.sampler.scaled(torch.ones(1, 1, 1, 1, device=scaled.device), step.t)
        # In half precision small gradients would become 0 on their way back.
        lift = 2.0**10 if scaled.dtype == torch.float16 else 1.0
        lifted = replace(wanted, loss=lambda maps: wanted.loss(maps) * lift)
        run_of = _Differentiated(scaled, step, batches, self._recorder(wanted.request), lifted)
        run = self._together if prepared.spec.branch_batch_size is None else self._in_turn
        with self._frozen(), self._advice():
            losses, gradient, output, maps = run(prepared.spec, run_of)
        self.cost.rows_backward += text.rows
        gradient = gradient.float() / lift / per_latent
        maps = maps.detached()
        prediction = Prediction(output.detach(), text.roles, maps) if wanted.whole else None
        return Gradient(losses.detach() / lift, gradient, maps, prediction)

    def micro_batches(self, prepared: PreparedPass, step: Step, *, conditional: bool) -> Sequence[MicroBatch]:
        """The micro-batches of a pass at the weights of a step; only conditional rows, or all."""
        ranks = self.concepts.step_ranks(*self.sampler.at(step)) if self.concepts.rank_schedules else ()
        return prepared.micro_batches(self.installation, self.concepts, step, ranks, conditional=conditional)

    def _text(self, prepared: PreparedPass, conditional: bool) -> Conditioning:
        return prepared.spec.text.conditional() if conditional else prepared.spec.text

    def _recorder(self, request: MapRequest) -> Recorder:
        self_layers = self.backbone.self_map_layers if request.self_attention else ()
        return Recorder(request.layers or self.backbone.map_layers, request.tokens, self_layers, request.output_layer)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside this block no weight requires a gradient, and the graph keeps the weights that it needs."""
        nets = [control.control.model for control in self.controls if isinstance(control, PreparedControlNet)]
        with ExitStack() as stack:
            for model in (self.backbone.model, *nets):
                stack.enter_context(frozen(uncompiled(model)))
                stack.enter_context(weights_kept(uncompiled(model)))
            yield

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Adds advice to an out-of-memory error."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not getattr(uncompiled(self.backbone.model), "is_gradient_checkpointing", False):
                error.add_note(
                    "updates need much less memory, and give the same numbers, with gradient checkpointing: "
                    "pipe.model.enable_gradient_checkpointing(), or --save-memory gradient-checkpointing"
                )
            raise

    def _together(self, spec: Pass, wanted: _Differentiated) -> tuple[Tensor, Tensor, Tensor, AttentionMaps]:
        """Losses, gradient and output by one graph of all rows."""
        with torch.enable_grad():
            scaled = wanted.scaled.detach().requires_grad_()
            output = self._run(scaled, wanted.step, spec, wanted.batches, [wanted.recorder], whole=wanted.of.whole)
            maps = AttentionMaps.of(wanted.recorder)
            losses = wanted.of.loss(maps)
            (gradient,) = torch.autograd.grad(losses.sum(), scaled)
        return losses, gradient, output, maps

    def _in_turn(self, spec: Pass, wanted: _Differentiated) -> tuple[Tensor, Tensor, Tensor, AttentionMaps]:
        """The gradient with one graph per micro-batch: first all maps without a graph, then each micro-batch again."""
        recorder = wanted.recorder
        with torch.no_grad():
            output = self._run(wanted.scaled, wanted.step, spec, wanted.batches, [recorder], whole=wanted.of.whole)
        with torch.enable_grad():
            leaves = [taken.requires_grad_() for taken in (*recorder.maps.values(), *recorder.self_maps.values())]
            maps = AttentionMaps.of(recorder)
            losses = wanted.of.loss(maps)
            pulls = torch.autograd.grad(losses.sum(), leaves)
        gradient = torch.zeros_like(wanted.scaled)
        for batch in wanted.batches:
            part = recorder.of_rows(batch.rows)
            with torch.enable_grad():
                leaf = wanted.scaled.detach().requires_grad_()
                self._run(leaf, wanted.step, spec, [batch], [part], whole=False)
                taken = [*part.maps.values(), *part.self_maps.values()]
                gradient += torch.autograd.grad(taken, leaf, [pull[..., batch.rows, :, :] for pull in pulls])[0]
        return losses, gradient, output, maps

    def _run(
        self,
        scaled: Tensor,
        step: Step,
        spec: Pass,
        batches: Sequence[MicroBatch],
        recorders: Sequence[Recorder],
        *,
        whole: bool,
    ) -> Tensor:
        """All rows, through the denoiser to its end, or to the last layer that is recorded."""
        wanted = [layer for recorder in recorders for layer in recorder.all_layers]
        parts = [[r.of_rows(batch.rows) for r in recorders] for batch in batches] if len(batches) > 1 else [recorders]
        outputs, view, total = [], View(spec.window, spec.image), sum(batch.text.rows for batch in batches)
        # Rows are counted in latents of the whole canvas.
        fraction = scaled.shape[-2] * scaled.shape[-1] / math.prod(self.canvas.latent_grid)
        with nullcontext() if whole else self.backbone.truncated_after(wanted):
            for batch, part in zip(batches, parts, strict=True):
                text = batch.text
                self.installation.use(batch.inputs, *part)
                latents = torch.cat([scaled] * (text.rows // text.images))
                inputs = {
                    **for_rows(self.inputs, view, text.rows),
                    **self._control_inputs(latents, step, text, view, fraction),
                    **({"several_texts": True} if text.several_texts else {}),
                }
                with self.caches.of((spec, total, batch.rows.start) if whole else None, anew=bool(wanted) or not whole):
                    outputs.append(self.backbone.forward(latents, step.t, text.prompt_embeds, text.added, **inputs))
                if whole:
                    self.cost.rows_forward += text.rows * fraction
                else:
                    self.cost.rows_stopped += text.rows * fraction
        if len(batches) > 1:
            for recorder, taken in zip(recorders, zip(*parts, strict=True), strict=True):
                recorder.join(taken, [batch.text.rows for batch in batches])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _control_inputs(
        self, latents: Tensor, step: Step, text: Conditioning, view: View, fraction: float
    ) -> Mapping[str, Any]:
        """Arguments of the denoiser from ControlNets, T2I-Adapters and IP-Adapters in this step."""
        acting = [control for control in self.controls if control.acts(step.index, step.count)]
        guides = [control for control in acting if not isinstance(control, PreparedImagePrompts)]
        prompts = [control.inputs(text, view) for control in acting if isinstance(control, PreparedImagePrompts)]
        read = [control.read_by(text) for control in guides if isinstance(control, PreparedControlNet)]
        self.cost.control_rows += sum(len(text.roles.select(rows)) for rows in read) * fraction
        return {**model_inputs(guides, latents, step.t, text, view), **dict(*prompts)}


def check_pass(spec: Pass, backbone: Backbone) -> None:
    """Raises ValueError for a pass that a model cannot run: region attention beside a bias, or where there is none."""
    if spec.text_bias is not None and spec.regions is not None:
        raise ValueError("a bias on the text needs one text for all cells, so a pass has it or region attention")
    if spec.regions is not None and not backbone.reads_regions:
        raise ValueError(
            "this method needs cross-attention that reads a text for each region, and only UNets and Anima have it; "
            "use draft, regional, tara or merge with this model"
        )
