"""The only way to run the UNet during a call; it counts what it costs."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from lora_compose.attention import (
    Derived,
    Gates,
    Installation,
    Layout,
    Recorder,
    attention_layers,
    coarser,
    frozen,
    grid_at,
    install,
    installed_layers,
    map_level,
    places,
    stopped_after,
    weights_kept,
)
from lora_compose.attention.layers import Grid, Kind, Place, sent, uncompiled
from lora_compose.pipelines.conditioning import Conditioning, TokenMasks, join_rows
from lora_compose.pipelines.control import Guide, NetGuide, View, unet_inputs
from lora_compose.pipelines.loading import TEXT_ENCODERS, Factors, LoraFile
from lora_compose.pipelines.notes import say_once
from lora_compose.pipelines.output import Cost
from lora_compose.pipelines.regions import Window
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.tokens import Mention
from lora_compose.pipelines.weights import TEXT, Schedule, check_block, in_blocks, is_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConcept:
    """A concept with the factors of its LoRA.

    Attributes:
        concept: All its fields; weight is set.
        factors: Its LoRA, matched to the pipeline's models.
        file: Where it came from; None for an adapter loaded by `load_lora_weights`.
    """

    concept: Concept
    factors: Factors
    file: LoraFile | None = None

    @property
    def trained_with(self) -> str | None:
        """How the LoRA was trained ("tara"), from the file's metadata."""
        return self.file.metadata.get("method") if self.file else None


def check_blocks(loaded: LoadedConcept, unet: nn.Module) -> None:
    """Checks the blocks for which a concept has factors, and says which of them its LoRA does not change.

    Raises:
        ValueError: If the UNet has no such block.
    """
    name, factors = loaded.concept.name, loaded.factors
    for block in loaded.concept.blocks or {}:
        if block == TEXT:
            changed = bool(factors.text_encoders)
        else:
            check_block(name, block, [layer for layer, _ in uncompiled(unet).named_modules()])
            changed = any(is_in(layer, block) for layer in factors.unet)
        if not changed:
            say_once(f"the LoRA of {name!r} changes nothing in {block}, so a factor there has no effect")


@dataclass(frozen=True)
class EncodedText:
    """What a pipeline's text encoders say, one row per image.

    Attributes:
        prompt_embeds: Shape: [images, tokens, channels]; layers * channels where each cross-attention layer has a text
            of its own.
        negative_prompt_embeds: The same for the negative prompts; None without guidance.
        added_cond_kwargs: Further inputs of the UNet by row, ordered (uncond, cond).
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    added_cond_kwargs: Mapping[str, Tensor] | None = None

    def of_images(self, images: Sequence[int]) -> "EncodedText":
        """Some of the images."""
        every, negative, added = len(self.prompt_embeds), self.negative_prompt_embeds, self.added_cond_kwargs
        if added is not None:
            parts = {key: rows.unflatten(0, (-1, every))[:, images] for key, rows in added.items()}
            added = {key: part.flatten(0, 1) for key, part in parts.items()}
        return EncodedText(self.prompt_embeds[images], None if negative is None else negative[images], added)


Encoder = Callable[[Sequence[str] | None, Sequence[str] | None], EncodedText]
"""Encodes prompts and negative prompts with a pipeline's text encoders, in whatever state they are; None is the
call's own."""

Finder = Callable[
    [Sequence[Concept], Sequence[str], Collection[str], Sequence[Mapping[str, Mention]] | None], TokenMasks
]
"""Finds the words of concepts in prompts: the triggers of those named in the third argument alone, and by prompt what
else names a concept. All have to be there."""

Objective = Callable[[Recorder], Tensor]
"""What is wrong with the attention maps of a pass, one number per image."""


Portion = tuple[Conditioning, Gates, slice]
"""Rows that are run together, and which of all rows they are."""


_EVERYTHING = View()


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one UNet pass says.

    Attributes:
        model_output: What the scheduler takes (noise, velocity). Shape: [rows, channels, height, width].
        unconds: How many parts of the rows, one row per image each, come first and are uncond.
        images: Images in the batch.
    """

    model_output: Tensor
    unconds: int
    images: int

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The uncond parts and the branches. Shape: [parts, images, channels, height, width] each."""
        parts = self.model_output.unflatten(0, (-1, self.images))
        return parts[: self.unconds], parts[self.unconds :]


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a pass with a gradient gives.

    Attributes:
        losses: The objective by image, fp32, on the CPU. Shape: [images].
        direction: Its gradient in the scale of the latents, fp32. Shape: as the latents.
        prediction: What the UNet said, if it was run to its end.
    """

    losses: Tensor
    direction: Tensor
    prediction: Prediction | None = None


@dataclass(frozen=True, eq=False)
class _Differentiated:
    """A pass whose gradient is wanted, as `Engine.gradient` is asked for it; latents are scaled for the model."""

    scaled: Tensor
    t: Tensor
    conditioning: Conditioning
    gates: Gates
    record: Recorder
    objective: Objective
    layout: Layout | None
    whole: bool


class Engine:
    """Encodes prompts, installs concepts and runs the UNet for the method of one call.

    Args:
        components: unet, scheduler and text encoders by name.
        concepts: Who takes part.
        encoder: Encodes the prompts of the call.
        finder: Finds the concepts' words.
        prompts: The prompts of the call; None if it was given embeddings.
        token_masks: Where the concepts' words stand in them.
        latent_grid: Height and width of the latents.
        image_size: Height and width of the image in pixels.
        images_per_prompt: How many images each prompt gets.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        guidance_rescale: As in diffusers.
        device: Where the UNet runs.
        unet_kwargs: Further arguments of every UNet call (timestep_cond, cross_attention_kwargs).
        started: When the call began, by `time.perf_counter()`.
        members: By prompt, who of the concepts takes part; None is all in every prompt.
        guides: What ControlNets and T2I-Adapters say about where things are.

    Attributes:
        weights: Of the concepts; 1 for those whose weight changes over the steps, as the engine itself multiplies their
            gates by it in every pass.
        cost: What has been run so far.
        step: The current step.
        timesteps: The timesteps of all steps.
        record_steps: Steps of which attention maps are kept.
    """

    def __init__(
        self,
        components: Mapping[str, Any],
        concepts: Sequence[LoadedConcept],
        encoder: Encoder,
        finder: Finder,
        prompts: Sequence[str] | None,
        token_masks: TokenMasks,
        *,
        latent_grid: Grid,
        image_size: Grid,
        images_per_prompt: int,
        guidance_scale: float,
        guidance_rescale: float,
        device: torch.device,
        unet_kwargs: Mapping[str, Any],
        started: float,
        members: Sequence[Sequence[int]] | None = None,
        guides: Sequence[Guide] = (),
    ) -> None:
        self.loaded = tuple(concepts)
        self.concepts = tuple(loaded.concept for loaded in concepts)
        schedules = [Schedule.of(0.0 if concept.weight is None else concept.weight) for concept in self.concepts]
        self.weights = tuple(1.0 if (fixed := schedule.constant) is None else fixed for schedule in schedules)
        self._schedules = {i: schedule for i, schedule in enumerate(schedules) if schedule.constant is None}
        # Adapters of these names give way to the concepts, also to those that come from a file.
        self._names = [concept.name for concept in self.concepts]
        self.prompts = None if prompts is None else tuple(prompts)
        self.token_masks = token_masks
        everybody = tuple(range(len(self.concepts)))
        self.members = [everybody] * len(token_masks.trigger) if members is None else [tuple(mine) for mine in members]
        self.latent_grid = latent_grid
        self.image_size = image_size
        self.images_per_prompt = images_per_prompt
        self.guidance_scale = guidance_scale
        self.device = device
        self.started = started
        self.cost = Cost()
        self.step = 0
        self.timesteps: Sequence[Tensor] | Tensor = ()
        self.record_steps: frozenset[int] = frozenset()
        self.components = components
        self._unet: UNet2DConditionModel = components["unet"]
        self._scheduler = components["scheduler"]
        self.encoder = encoder
        self.finder = finder
        self.guidance_rescale = guidance_rescale
        self.unet_kwargs = dict(unet_kwargs)
        self.guides = tuple(guides)
        self._log: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._masks: dict[int, list[tuple[list[int], Tensor]]] = {}
        self._installation: Installation | None = None
        self._first: Conditioning | None = None
        self._cut_text: WeakKeyDictionary[Conditioning, Conditioning] = WeakKeyDictionary()
        self._cut_gates = Derived()
        self._cut_portions: WeakKeyDictionary[Gates, Sequence[Portion]] = WeakKeyDictionary()
        self._weighted_for: tuple[float, ...] = ()
        self._weighted_gates = Derived()
        sample = self._unet.config["sample_size"]
        self.native_side = min((sample, sample) if isinstance(sample, int) else sample)
        layers = attention_layers(self._unet)
        self.map_level = map_level(layers)
        wanted = [layer for layer in layers if layer.level == self.map_level]
        self.map_layers = tuple(layer.name for layer in wanted if layer.cross)
        self.self_map_layers = tuple(layer.name for layer in wanted if not layer.cross)
        self.levels = frozenset(place.level for place in places(self._unet).values())

    @property
    def images(self) -> int:
        """Images in the batch."""
        return len(self.token_masks.trigger) * self.images_per_prompt

    @property
    def subjects(self) -> tuple[int, ...]:
        """Indices of the concepts that are no styles."""
        return tuple(i for i, concept in enumerate(self.concepts) if not concept.is_style)

    @property
    def subjects_of(self) -> list[tuple[int, ...]]:
        """By prompt, who takes part and is no style."""
        return [tuple(i for i in mine if not self.concepts[i].is_style) for mine in self.members]

    @property
    def styles_of(self) -> list[tuple[int, ...]]:
        """By prompt, who takes part and is a style."""
        return [tuple(i for i in mine if self.concepts[i].is_style) for mine in self.members]

    @property
    def guided(self) -> bool:
        """Whether this step has classifier-free guidance; a callback may switch it off."""
        return self.guidance_scale > 1 and self._unet.config["time_cond_proj_dim"] is None

    @property
    def has_controlnet(self) -> bool:
        """Whether a ControlNet takes part, which reads what the canvas shows as a whole."""
        return any(isinstance(guide, NetGuide) for guide in self.guides)

    @property
    def differ(self) -> bool:
        """Whether not all prompts have the same concepts."""
        return any(mine != self.members[0] for mine in self.members)

    def weights_of(self, chosen: Sequence[Collection[int]] | None = None) -> Tensor:
        """The weight of every concept in every prompt, 0 where it takes no part.

        Args:
            chosen: By prompt, who takes part; None is everybody whom the prompt has.

        Returns:
            On the CPU. Shape: [prompts, concepts], or [1, concepts] if it is the same for all prompts.
        """
        parts = self.members if chosen is None else chosen
        weights = torch.tensor([[w if i in mine else 0.0 for i, w in enumerate(self.weights)] for mine in parts])
        return weights[:1] if (weights == weights[0]).all() else weights

    def by_row(self, weights: Tensor, conditioning: Conditioning) -> Tensor:
        """The same for the rows of a pass. Shape: [prompts or 1, ...] -> [rows or 1, ...], on the device."""
        if len(weights) > 1:
            images = weights.repeat_interleave(self.images_per_prompt, dim=0)
            weights = torch.cat([images] * (conditioning.rows // conditioning.images))
        return weights.to(self.device)

    @property
    def second_pass(self) -> bool:
        """Whether the scheduler goes back to the latents of the pass before, in the second pass of a step (Heun).

        What a method does to the latents before such a pass is lost.
        """
        return self.step % self._scheduler.order > 0

    def encode(
        self,
        text_weights: Sequence[float] | Tensor | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        names: Collection[str] = (),
        mentions: Sequence[Mapping[str, Mention]] | None = None,
    ) -> Conditioning:
        """Encodes the prompts of the call, or others in their place, one for each.

        Args:
            text_weights: Weight of every concept's text-encoder factors, for all prompts or, [prompts, concepts], for
                each; None leaves them out.
            prompts: Instead of the call's own.
            negative_prompts: Instead of the call's own.
            names: Concepts whose words are looked for in those prompts.
            mentions: By prompt, what else names a concept.

        Raises:
            ValueError: If a trigger is missing.
        """
        masks = self.token_masks
        if prompts is not None:
            masks = self.find(prompts, names, mentions)
        parts = [part for part in TEXT_ENCODERS if self.components.get(part) is not None]
        stack = ExitStack()
        with stack:
            for part in parts:
                stack.enter_context(self._text_factors(part, text_weights))
            text = self.encoder(prompts, negative_prompts)
        conditioning = self._conditioning(text, masks)
        if self._first is None:
            self._first = conditioning
        return conditioning

    def find(
        self,
        prompts: Sequence[str],
        names: Collection[str],
        mentions: Sequence[Mapping[str, Mention]] | None = None,
    ) -> TokenMasks:
        """Where the words of the named concepts, and of no others but those mentioned, stand in prompts.

        Raises:
            ValueError: If one is missing.
        """
        return self.finder(self.concepts, prompts, names, mentions)

    @property
    def conditioning(self) -> Conditioning:
        """What was encoded first: the prompts of the call, as callbacks see them."""
        if self._first is None:
            raise RuntimeError("the method has not encoded the prompts yet")
        return self._first

    @conditioning.setter
    def conditioning(self, conditioning: Conditioning) -> None:
        self._first = conditioning

    @contextmanager
    def _text_factors(self, part: str, weights: Sequence[float] | Tensor | None) -> Iterator[None]:
        model: nn.Module = self.components[part]
        loras = [c.factors.text_encoders.get(part, {}) if weights is not None else {} for c in self.loaded]
        kinds: dict[str, Kind] = {"text_projection": "row"}  # sees one vector of the whole prompt
        where = {name: Place(kinds.get(name, "text"), 0) for name, _ in uncompiled(model).named_modules()}
        to = {"device": self.device, "dtype": model.dtype, "silence": self._names}
        with installed_layers(model, loras, where, **to) as installation:  # pyright: ignore[reportArgumentType]
            if weights is not None:
                gate = self._of_text(torch.as_tensor(weights)).to(self.device)
                gate = gate if gate.dim() == 2 else gate[None]
                installation.use(Gates(gate[:, None], {}, gate, (1, 1)))
            yield

    def _of_text(self, weights: Tensor) -> Tensor:
        """Weights of the text encoders' factors: text is encoded once, so what changes over the steps is its mean.

        Shape: [(prompts,) concepts], likewise what is returned.
        """
        steps, factors = max(1, len(self.timesteps)), []
        acting = (torch.atleast_2d(weights) != 0).any(dim=0).tolist()
        for i, (acts, loaded) in enumerate(zip(acting, self.loaded, strict=True)):
            schedule, blocks = self._schedules.get(i), loaded.concept.blocks or {}
            if schedule is not None and acts and loaded.factors.text_encoders:
                say_once(
                    f"the text is encoded once, so the text-encoder part of {loaded.concept.name!r} has the mean of "
                    f"its weights over the steps, {schedule.mean(steps):.3g}, in all of them"
                )
            factors.append((1.0 if schedule is None else schedule.mean(steps)) * blocks.get(TEXT, 1.0))
        return weights * torch.tensor(factors)

    def _conditioning(self, text: EncodedText, masks: TokenMasks) -> Conditioning:
        embeds, negative = text.prompt_embeds, text.negative_prompt_embeds
        trigger, phrase = (
            join_rows(None if negative is None else torch.zeros_like(mask), [mask], self.images_per_prompt)
            for mask in (masks.trigger.to(self.device), masks.phrase.to(self.device))
        )
        return Conditioning(
            embeds if negative is None else torch.cat([negative, embeds]),
            trigger,
            phrase,
            unconds=0 if negative is None else 1,
            images=embeds.shape[0],
            added_cond_kwargs=text.added_cond_kwargs,
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Concepts are in the UNet inside this block, and nowhere after it."""
        loras = [in_blocks(loaded.factors.unet, loaded.concept.blocks) for loaded in self.loaded]
        with install(
            self._unet,
            loras,
            device=self.device,
            dtype=self._unet.dtype,
            silence=self._names,  # pyright: ignore[reportArgumentType]
        ) as installation:
            self._installation = installation
            try:
                yield
            finally:
                self._installation = None

    @property
    def installation(self) -> Installation:
        """What is installed in the UNet; exists inside `installed()` only."""
        if self._installation is None:
            raise RuntimeError("the UNet can run only inside `Engine.installed()`")
        return self._installation

    def fold(self, kinds: Sequence[Kind], weights: Sequence[float]) -> None:
        """Promises that some kinds of layers have these constant gates during the whole call: base speed for any N.

        But for what changes over the steps: concepts with such a weight stay in the bank.
        """
        folded = self.installation.fold(kinds, weights, self._schedules.keys())
        logger.debug("folded %d layers, %d stay in the bank", folded, len(self.installation.bank))

    def unet(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        gates: Gates,
        layout: Layout | None = None,
        window: Window | None = None,
        record: Recorder | None = None,
        image: int | None = None,
    ) -> Prediction:
        """One pass.

        Args:
            latents: Shape: [images, channels, height, width].
            t: The timestep.
            conditioning: The text of all rows.
            gates: How strongly each concept acts where.
            layout: What attention does differently in regions; needed if the conditioning has several texts.
            window: Which rows and columns of the canvas the latents are; None is all of it.
            record: Takes attention maps meanwhile; its readout is for the rows that are run.
            image: Which image of the batch the latents are; None is all of them.
        """
        conditioning, gates = self._at(conditioning, gates)
        watch = self._watch(conditioning)
        recorders = [recorder for recorder in (watch, record) if recorder is not None]
        scaled = self._scheduler.scale_model_input(latents, t)
        output = self._pass(scaled, t, conditioning, gates, recorders, layout, View(window, image), whole=True)
        if watch is not None:
            self.keep_maps(*self._concept_maps(watch, conditioning, window, image))
        return Prediction(output, conditioning.unconds, conditioning.images)

    def observe(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        gates: Gates,
        record: Recorder,
        layout: Layout | None = None,
    ) -> None:
        """Attention maps alone: a pass of the prompt's rows that stops after the last recorded layer.

        Args: as for `unet`, and the recorder, whose readout is for the prompt's rows.
        """
        conditioning, gates = self._at(conditioning, gates, conditional=True)
        scaled = self._scheduler.scale_model_input(latents, t)
        self._pass(scaled, t, conditioning, gates, [record], layout, whole=False)

    def gradient(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        gates: Gates,
        record: Recorder,
        objective: Objective,
        layout: Layout | None = None,
        *,
        whole: bool = False,
    ) -> Gradient:
        """The gradient of an objective on attention maps with respect to the latents, as `observe` sees them.

        With respect to the latents as the UNet gets them, and given back in the scale of `latents`, so that one step
        size serves all schedulers: those that scale the input down (Euler) would otherwise take steps too small.

        One graph exists at a time, in which no weight asks for a gradient: of all rows, or of those that the
        conditioning wants to be run at once, which then are run a second time. The host waits for the device once.

        Args: as for `observe`, and
            objective: What is to become smaller.
            whole: Whether the pass goes on to the end, with the uncond rows as well, and gives a prediction. The
                recorder's readout is for all rows then.

        Raises:
            RuntimeError: Under `torch.inference_mode`, which knows no gradients.
            ValueError: If the gradient is not finite.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("this method needs gradients: call it outside torch.inference_mode()")
        conditioning, gates = self._at(conditioning, gates, conditional=not whole)
        scaled = self._scheduler.scale_model_input(latents, t)
        per_latent = self._scheduler.scale_model_input(torch.ones(1, 1, 1, 1, device=self.device), t)
        # In half precision small gradients would become 0 on their way back.
        lift = 2.0**10 if scaled.dtype == torch.float16 else 1.0
        wanted = _Differentiated(
            scaled, t, conditioning, gates, record, lambda taken: objective(taken) * lift, layout, whole
        )
        differentiate = self._together if conditioning.at_once is None else self._in_turn
        with self._frozen(), self._advice():
            losses, gradient, output = differentiate(wanted)
        self.cost.rows_backward += conditioning.rows
        gradient = gradient.float() / lift / per_latent
        *by_image, finite = self.read(torch.cat([losses.detach() / lift, gradient.isfinite().all()[None]])).unbind()
        if not finite:
            raise ValueError(f"the gradient at step {self.step} is not finite; try float32 or a smaller step size")
        prediction = Prediction(output.detach(), conditioning.unconds, conditioning.images) if whole else None
        return Gradient(torch.stack(by_image), gradient, prediction)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside this block no weight of what a pass runs asks for a gradient, and a graph keeps those it needs."""
        nets = [guide.control.model for guide in self.guides if isinstance(guide, NetGuide)]
        with ExitStack() as stack:
            for model in (self._unet, *nets):
                stack.enter_context(frozen(uncompiled(model)))
                stack.enter_context(weights_kept(uncompiled(model)))
            yield

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Where the memory does not suffice for a gradient, the error says what needs less."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not uncompiled(self._unet).is_gradient_checkpointing:
                error.add_note(
                    "updates need much less memory, and give the same numbers, with gradient checkpointing: "
                    "pipe.unet.enable_gradient_checkpointing(), or --save-memory gradient-checkpointing"
                )
            raise

    def _together(self, wanted: _Differentiated) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, gradient and output by one graph of all rows."""
        with torch.enable_grad():
            scaled = wanted.scaled.detach().requires_grad_()
            output = self._pass(
                scaled, wanted.t, wanted.conditioning, wanted.gates, [wanted.record], wanted.layout, whole=wanted.whole
            )
            losses = wanted.objective(wanted.record)
            (gradient,) = torch.autograd.grad(losses.sum(), scaled)
        return losses, gradient, output

    def _in_turn(self, wanted: _Differentiated) -> tuple[Tensor, Tensor, Tensor]:
        """The same with one graph of some rows at a time: maps first, without a graph, then once more for each."""
        record = wanted.record
        with torch.no_grad():
            output = self._pass(
                wanted.scaled, wanted.t, wanted.conditioning, wanted.gates, [record], wanted.layout, whole=wanted.whole
            )
        with torch.enable_grad():
            maps = [taken.requires_grad_() for taken in (*record.maps.values(), *record.self_maps.values())]
            losses = wanted.objective(record)
            pulls = torch.autograd.grad(losses.sum(), maps)
        gradient = torch.zeros_like(wanted.scaled)
        for text, gate, rows in self._portions(wanted.conditioning, wanted.gates):
            portion = record.of_rows(rows)
            with torch.enable_grad():
                leaf = wanted.scaled.detach().requires_grad_()
                self._pass(leaf, wanted.t, text, gate, [portion], wanted.layout, whole=False)
                taken = [*portion.maps.values(), *portion.self_maps.values()]
                gradient += torch.autograd.grad(taken, leaf, [pull[..., rows, :, :] for pull in pulls])[0]
        return losses, gradient, output

    def _pass(
        self,
        scaled: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        gates: Gates,
        recorders: Sequence[Recorder],
        layout: Layout | None,
        view: View = _EVERYTHING,
        *,
        whole: bool,
    ) -> Tensor:
        """All rows, through the UNet to its end, or to the last layer that is recorded."""
        wanted = [layer for recorder in recorders for layer in recorder.layers | recorder.self_layers]
        outputs, portions = [], self._portions(conditioning, gates)
        parts = [[r.of_rows(rows) for r in recorders] for *_, rows in portions] if len(portions) > 1 else [recorders]
        with nullcontext() if whole else stopped_after(self._unet, wanted):
            for (text, gate, _), part in zip(portions, parts, strict=True):
                self._use(gate, text.prompt_embeds, part, layout)
                latents = torch.cat([scaled] * (text.rows // text.images))
                outputs.append(self._run(latents, t, text, self._guidance(latents, t, text, view)))
        if len(portions) > 1:
            for recorder, taken in zip(recorders, zip(*parts, strict=True), strict=True):
                recorder.join(taken)
        rows = conditioning.rows * self._share(scaled)
        if whole:
            self.cost.rows_forward += rows
        else:
            self.cost.rows_stopped += rows
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _use(self, gates: Gates, text: Tensor, recorders: Sequence[Recorder], layout: Layout | None) -> None:
        """Sets what the layers need in the next pass."""
        self.installation.use(gates, text, *recorders, layout=layout)

    def _portions(self, conditioning: Conditioning, gates: Gates) -> "Sequence[Portion]":
        """The rows that are run together, the same objects every time."""
        if conditioning.at_once is None:
            return [(conditioning, gates, slice(None))]
        if gates not in self._cut_portions:
            size, images = conditioning.at_once, conditioning.images
            every = [slice(start, start + size) for start in range(0, conditioning.rows // images, size)]
            rows = [slice(parts.start * images, parts.stop * images) for parts in every]
            texts = [conditioning.of_parts(parts) for parts in every]
            self._cut_portions[gates] = [(text, gates.select(one), one) for text, one in zip(texts, rows, strict=True)]
        return self._cut_portions[gates]

    def _share(self, latents: Tensor) -> float:
        """What part of the canvas some latents are."""
        return latents.shape[-2] * latents.shape[-1] / (self.latent_grid[0] * self.latent_grid[1])

    def read(self, numbers: Tensor) -> Tensor:
        """Numbers on the CPU, for which the host waits until the device has come so far."""
        return numbers.cpu()

    def found(self, masks: Tensor) -> Tensor:
        """Masks that were read from attention maps, on the CPU. Shape: [images, concepts, height, width], bool."""
        return masks.cpu()

    def _guidance(self, latents: Tensor, t: Tensor, conditioning: Conditioning, view: View) -> Mapping[str, Any]:
        """What the controls that act in this step give the UNet."""
        acting = [guide for guide in self.guides if guide.control.acts(self.step, len(self.timesteps))]
        firsts = [guide.first_row(conditioning) for guide in acting if isinstance(guide, NetGuide)]
        self.cost.control_rows += sum(conditioning.rows - first for first in firsts) * self._share(latents)
        return unet_inputs(acting, latents, t, conditioning, view)

    def _run(self, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance: Mapping[str, Any]) -> Tensor:
        """The UNet itself, for which everything is set. Shape: [rows, channels, height, width]."""
        added = conditioning.added_cond_kwargs
        return self._unet(
            latents,
            t,
            encoder_hidden_states=conditioning.first_embeds,
            added_cond_kwargs=None if added is None else dict(added),
            return_dict=False,
            **self.unet_kwargs,
            **guidance,
        )[0]

    def guide(self, prediction: Prediction) -> Tensor:
        """Classifier-free guidance over a pass with one branch. Shape: [images, channels, height, width]."""
        if not prediction.unconds:
            return prediction.model_output
        uncond, cond = prediction.model_output.chunk(2)
        guided = uncond + self.guidance_scale * (cond - uncond)
        if self.guidance_rescale > 0:
            guided = rescale_noise_cfg(guided, cond, guidance_rescale=self.guidance_rescale)
        return guided

    def keep_maps(self, maps: Tensor, seen: Tensor) -> None:
        """The maps of a pass in a step that is recorded, and where it has looked.

        Args:
            maps: 0 elsewhere. Shape: [images, concepts, height, width].
            seen: 1 there. Shape: [images, 1, height, width].
        """
        self._log.setdefault(self.step, []).append((maps, seen))

    def keep_masks(self, masks: Tensor, images: Sequence[int] | None = None) -> None:
        """Where a method has each concept in this step, to be returned if the step is recorded.

        Args:
            masks: On the map grid. Shape: [images, concepts, height, width], bool.
            images: Which of them these are; None is all.
        """
        if self.step in self.record_steps:
            every = range(self.images) if images is None else images
            self._masks.setdefault(self.step, []).append((list(every), masks))

    def masks(self) -> Tensor | None:
        """The masks of all recorded steps. Shape: [steps, images, concepts, height, width], bool."""
        found = self.attention_maps()
        if found is None:
            return None
        steps, maps = found
        masks = masks_of(maps)
        for step, every in zip(steps, masks, strict=True):
            for images, mine in self._masks.get(step, ()):
                every[images] = mine
        return masks

    def attention_maps(self) -> tuple[tuple[int, ...], Tensor] | None:
        """The recorded steps and their maps. Shape: [steps, images, concepts, height, width], fp32."""
        if not self._log:
            return None
        steps = tuple(sorted(self._log))
        return steps, torch.stack([_mean_where_seen(self._log[step]) for step in steps])

    def _at(self, conditioning: Conditioning, gates: Gates, *, conditional: bool = False) -> tuple[Conditioning, Gates]:
        """What this step takes of them: its weights, and all rows, unless a callback has switched guidance off."""
        if conditional or not self.guided:
            conditioning, gates = self._without_uncond(conditioning, gates)
        return conditioning, self._weighted(gates)

    @property
    def step_weights(self) -> tuple[float, ...]:
        """What this step's gates are multiplied by: weights that change over the steps; 1 for the others."""
        steps = max(1, len(self.timesteps))
        every = enumerate(self.concepts)
        return tuple(self._schedules[i].at(self.step, steps) if i in self._schedules else 1.0 for i, _ in every)

    def _weighted(self, gates: Gates) -> Gates:
        """The gates at the weights of this step, the same objects for as long as these do not change.

        Those of one step alone are kept: keys and values of all steps would take too much memory.
        """
        if not self._schedules:
            return gates
        if self._weighted_for != self.step_weights:
            self._weighted_for = self.step_weights
            self._weighted_gates.clear()
        factors = self._weighted_for
        return self._weighted_gates.of(gates, lambda g: g.times(sent(torch.tensor(factors), g.text.device)))

    def _without_uncond(self, conditioning: Conditioning, gates: Gates) -> tuple[Conditioning, Gates]:
        """Conditional rows only, the same objects every time, so that nothing is built again per step."""
        if not conditioning.guided:
            return conditioning, gates
        if conditioning not in self._cut_text:
            self._cut_text[conditioning] = conditioning.conditional()
        cut = self._cut_gates.of(gates, lambda whole: whole.select(conditioning.conditional_rows))
        return self._cut_text[conditioning], cut

    def _watch(self, conditioning: Conditioning) -> Recorder | None:
        if self.step not in self.record_steps or not self.concepts:
            return None
        words = conditioning.phrase_mask
        return Recorder(self.map_layers, words / words.sum(dim=-2, keepdim=True).clamp(min=1))

    def _concept_maps(
        self, recorder: Recorder, conditioning: Conditioning, window: Window | None, image: int | None
    ) -> tuple[Tensor, Tensor]:
        """Mean over the texts or branches in which a concept is named, and where the pass has looked.

        Returns:
            On the grid of the whole canvas. Shape: [images, concepts, height, width] and [images, 1, height, width].
        """
        rows = conditioning.conditional_rows
        named = (conditioning.phrase_mask[..., rows, :, :].sum(dim=-2) > 0).float()
        maps = recorder.mean()[..., rows, :, :]
        maps = maps.reshape(-1, conditioning.images, *maps.shape[-2:])
        named = named.reshape(-1, conditioning.images, named.shape[-1])  # [texts or branches, images, concepts]
        mean = (maps * named[:, :, None]).sum(dim=0) / named.sum(dim=0).clamp(min=1)[:, None]
        grid = grid_at(self.latent_grid, self.map_level)
        rows, columns = (slice(0, cells) for cells in self.latent_grid) if window is None else window
        place = slice(image, None if image is None else image + 1), slice(None)
        place = *place, coarser(rows, self.map_level), coarser(columns, self.map_level)
        whole = mean.new_zeros(self.images, mean.shape[-1], *grid)
        seen = mean.new_zeros(self.images, 1, *grid)
        seen[place] = 1
        whole[place] = mean.transpose(1, 2).unflatten(2, seen[place].shape[-2:])
        return whole, seen


def _mean_where_seen(passes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.stack([maps for maps, _ in passes]).sum(dim=0)
    return total / torch.stack([seen for _, seen in passes]).sum(dim=0).clamp(min=1)


def masks_of(maps: Tensor) -> Tensor:
    """Where each concept is, from its maps: above half of its own maximum, and above every other concept's share there.

    Args:
        maps: Shape: [..., concepts, height, width].

    Returns:
        The same shape, bool; no cell belongs to two concepts.
    """
    share = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    best = share.argmax(dim=-3, keepdim=True)
    mine = torch.zeros_like(share, dtype=torch.bool).scatter_(-3, best, True)
    return mine & (share >= 0.5)
