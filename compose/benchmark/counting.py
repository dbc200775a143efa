"""Latent rows and FLOPs of a whole image: a method's full schedule, run without values on the meta device.

Text encoders, VAE and scheduler are not counted; they are the same for every method, up to the text encoders' LoRAs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_compose.attention import LoraFactors, SitePart, StepCaches, install
from lora_compose.attention.device import uncompiled
from lora_compose.attention.sites import Grid
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.pipelines.calls.counting import CountingRunner
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.denoising.denoiser import Denoiser
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss, MapRequest, Pass, Prediction
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.support.notes import kept
from lora_compose.pipelines.text.encoder import EncodedText

META = torch.device("meta")


@dataclass(frozen=True)
class Counted:
    """The costs of one call: latent rows through the whole model, stopped early, and backward; FLOPs.

    A multiplication and an addition count as two; `preparation_flops` are those before the first denoising step.
    """

    rows_forward: float
    rows_stopped: float
    rows_backward: float
    flops: int
    preparation_flops: int

    @property
    def rows(self) -> str:
        """The rows in words: "50", or "50 + 13 stopped + 13 backward"."""
        parts = ((self.rows_forward, ""), (self.rows_stopped, " stopped"), (self.rows_backward, " backward"))
        return " + ".join(f"{number:g}{what}" for number, what in parts if number or not what)


def count(
    unet: UNet2DConditionModel,
    concepts: Sequence[LoadedConcept],
    settings: Settings | None,
    steps: int,
    guidance_scale: float,
    image_size: Grid,
    images: int = 1,
    *,
    tokens: int = 77,
    watched: AbstractContextManager[Any] | None = None,
) -> Counted:
    """Counts a call of a method, or of diffusers' own pipeline (None), for a prompt made of the concepts' phrases.

    Where the cost depends on values, such as when updates end, the maximum is counted. The UNet is on the meta device,
    the steps are DDIM's, `image_size` is height and width in pixels, and a prompt has so many tokens. `watched` is
    entered around the run, for example to watch its memory. Raises ValueError if the concepts lack something the method
    needs.
    """
    host = pipeline_of(unet, scheduler(), tokens)
    return _counted(host, concepts, settings, steps, guidance_scale, image_size, images, watched)


def count_run(
    pipe: Any,
    settings: Settings | None,
    loaded: Sequence[LoadedConcept],
    steps: int,
    guidance_scale: float,
    width: int,
    height: int,
    *,
    scheduler: Any = None,
) -> Counted:
    """Counts a call of a pipeline with a UNet, as `count` does, without changing or running it.

    A scheduler that is given takes the place of the pipeline's; neither is changed. Width and height are in pixels.
    Raises ValueError if the concepts lack something the method needs.
    """
    host, scheduler = copy(pipe), scheduler or pipe.scheduler
    host.unet = meta_unet(uncompiled(pipe.unet).config)
    host.scheduler = type(scheduler).from_config(scheduler.config)
    host.__dict__.pop("_concept_library", None)  # the copy gets one of its own
    return _counted(host, loaded, settings, steps, guidance_scale, (height, width))


def _counted(
    host: Any,
    concepts: Sequence[LoadedConcept],
    settings: Settings | None,
    steps: int,
    guidance_scale: float,
    image_size: Grid,
    images: int = 1,
    watched: AbstractContextManager[Any] | None = None,
) -> Counted:
    """Plans the call, and prices the passes of the plan."""
    if settings is None:
        return _plain(host, steps, guidance_scale, image_size, images, watched)
    unet = host.unet
    host.library.loaded.update({loaded.concept.name: _without_values(loaded) for loaded in concepts})
    with kept():  # warnings are for those who make images
        resolved = host.plan(
            " ".join(loaded.concept.phrase for loaded in concepts), concepts=[loaded.concept for loaded in concepts],
            method=settings, num_inference_steps=steps, guidance_scale=guidance_scale, height=image_size[0],
            width=image_size[1], num_images_per_prompt=images,
        ).resolved  # fmt: skip
        operations, backbone = Operations(), resolved.canvas.backbone
        loras = [loaded.lora for loaded in resolved.concepts.loaded]
        with (
            torch.no_grad(),
            watched or nullcontext(),
            install(backbone, loras, device=META, dtype=unet.dtype) as installed,
        ):
            counting = CountingRunner.of(resolved)
            # Everything except the model has values, on the CPU.
            inputs = {name: ByImage(value) for name, value in _unet_kwargs(unet, images).items()}
            denoiser = Denoiser(
                backbone, installed, counting.sampler, counting.canvas, resolved.concepts, (), inputs, counting.log,
                StepCaches(backbone.model),
            )  # fmt: skip
            runner = PricingRunner(
                resolved, counting.canvas, counting.sampler, counting.log, denoiser=denoiser, operations=operations
            )
            process = settings.start(resolved.session(resolved.sets[0], runner, runner.encode))
            schedule = resolved.sampler.schedule
            all_steps = [schedule.step(index, resolved.cfg_scale) for index in range(len(schedule.timesteps))]
            latents = torch.zeros(images, unet.config["in_channels"], *resolved.canvas.latent_grid, dtype=unet.dtype)
            latents = process.prepare(latents, all_steps[0])
            preparation = operations.flops
            for step in all_steps:
                latents, _ = process.step(latents, step)  # scaled latents have the same shape
    cost = runner.cost
    return Counted(cost.rows_forward, cost.rows_stopped, cost.rows_backward, operations.flops, preparation)


def meta_unet(config: Any) -> UNet2DConditionModel:
    """A UNet without values, on the meta device."""
    with META:
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return unet.eval()


@dataclass(frozen=True)
class PricingRunner(CountingRunner):
    """Prices the passes of a plan: of all passes with the same cost, it runs the first one, without values.

    Results and rows are those of `CountingRunner`. `prices` has FLOPs by kind of pass, with the keys and values of text
    that the pass keeps, by micro-batch.
    """

    denoiser: Denoiser = field(kw_only=True)
    operations: Operations = field(kw_only=True)
    prices: dict[tuple, tuple[int, Sequence[Mapping[str, tuple[Tensor, Tensor]]]]] = field(default_factory=dict)

    def encode(
        self, weights: Tensor | None, prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None
    ) -> EncodedText:
        """Texts as the model reads them, without values."""
        text = super().encode(weights, prompts, negative_prompts)
        images, tokens, _ = text.prompt_embeds.shape
        unet: Any = self.canvas.backbone.model
        return _text(unet, images, tokens, guided=text.negative_prompt_embeds is not None)

    def fold(self, parts: Sequence[SitePart], weights: Sequence[float]) -> None:
        """Folds, and counts its FLOPs."""
        with self.operations:
            self.denoiser.fold(parts, weights)

    def prepare(self, spec: Pass, same_text_as: PreparedPass | None = None) -> PreparedPass:
        """Prepares a pass on the meta device."""
        return self.denoiser.prepare(replace(spec, regions=_moved(spec.regions)), same_text_as)

    def predict(
        self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest | None = None
    ) -> Prediction:
        """Prices a forward pass."""
        run = partial(self.denoiser.predict, latents.to(META), step, prepared, _moved(request))
        self._price(lambda: run, "predict", latents, step, prepared, request, conditional=not step.guided)
        return super().predict(latents, step, prepared, request)

    def maps(self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest) -> AttentionMaps:
        """Prices a pass that stops early."""
        run = partial(self.denoiser.maps, latents.to(META), step, prepared, _moved(request))
        self._price(lambda: run, "maps", latents, step, prepared, request, conditional=True)
        return super().maps(latents, step, prepared, request)

    def gradient(self, latents: Tensor, step: Step, prepared: PreparedPass, wanted: MapLoss) -> Gradient:
        """Prices a pass with a gradient, without the loss itself, which is small."""

        def ready() -> Callable[[], object]:
            used = self._used(wanted)

            def standing_in(maps: AttentionMaps) -> Tensor:
                parts = zip((maps.text, maps.cells), used, strict=True)
                sums = [part.sum() for part, is_used in parts if is_used and part is not None]
                return torch.stack(sums).sum() + torch.zeros(len(latents), device=META)

            on_meta = MapLoss(_moved(wanted.request), standing_in, wanted.whole)
            return partial(self.denoiser.differentiate, latents.to(META), step, prepared, on_meta)

        what, conditional = f"gradient, {wanted.whole}", not (wanted.whole and step.guided)
        self._price(ready, what, latents, step, prepared, wanted.request, conditional)
        return super().gradient(latents, step, prepared, wanted)

    def _used(self, wanted: MapLoss) -> tuple[bool, bool]:
        """Whether a loss depends on the maps of text, and on those of self-attention."""
        maps = self._maps(wanted.request)
        with torch.enable_grad():
            leaves = [value.clone().requires_grad_() for value in (maps.text, maps.cells) if value is not None]
            pulls = torch.autograd.grad(wanted.loss(AttentionMaps(*leaves)).sum(), leaves, allow_unused=True)
        return pulls[0] is not None, len(pulls) > 1 and pulls[1] is not None

    def _price(
        self,
        ready: Callable[[], Callable[[], object]],
        what: str,
        latents: Tensor,
        step: Step,
        prepared: PreparedPass,
        request: MapRequest | None,
        conditional: bool,
    ) -> None:
        batches = self.denoiser.micro_batches(prepared, step, conditional=conditional)
        kept = [{} if batch.inputs.text_kv is None else batch.inputs.text_kv.kept for batch in batches]
        kind = (
            what, latents.shape, tuple(batch.text.prompt_embeds.shape for batch in batches), _kind_of(prepared.spec),
            request and (request.tokens.shape, request.self_attention, tuple(request.layers), request.output_layer),
            tuple(map(bool, kept)),
        )  # fmt: skip
        before = self.operations.flops
        if kind not in self.prices:
            run = ready()
            with self.operations:
                run()
            self.prices[kind] = self.operations.flops - before, [dict(batch) for batch in kept]
        flops, text_kv = self.prices[kind]
        self.operations.flops = before + flops
        for target, known in zip(kept, text_kv, strict=True):
            target.update(known)


def _kind_of(spec: Pass) -> tuple | bool:
    """The sizes that region attention depends on, or whether there is a bias."""
    if spec.regions is None:
        return spec.text_bias is not None
    sizes = [
        (level, *((len(group.cells), None if group.visible is None else len(group.visible)) for group in part.groups),
         *((text, len(cells)) for text, cells in part.queries.by_text))
        for level, part in sorted(spec.regions.partitions.items())
    ]  # fmt: skip
    return spec.regions.inject, spec.regions.isolate, tuple(sizes)


def _moved(value: Any) -> Any:
    """A value with all of its tensors on the meta device."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(map(_moved, value))
    if isinstance(value, Mapping):
        return {key: _moved(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name)) for field in fields(value)})
    return value


def _plain(
    host: Any,
    steps: int,
    guidance_scale: float,
    image_size: Grid,
    images: int,
    watched: AbstractContextManager[Any] | None,
) -> Counted:
    """Counts diffusers' own pipeline: the same pass again and again."""
    unet, grid = host.unet, [side // host.vae_scale_factor for side in image_size]
    branches = 2 if host.guider(guidance_scale).scale > 1 else 1
    host.scheduler.set_timesteps(steps)
    passes, rows = len(host.scheduler.timesteps), branches * images
    text = _text(unet, rows, host.tokenizer.model_max_length, guided=False)
    with torch.no_grad(), Operations() as operations, watched or nullcontext():
        unet(
            _empty(unet, rows, unet.config["in_channels"], *grid), torch.tensor(1), text.prompt_embeds,
            added_cond_kwargs=text.added, **_unet_kwargs(unet, images),
        )  # fmt: skip
    return Counted(passes * rows, 0.0, 0.0, passes * operations.flops, 0)


def _text(unet: UNet2DConditionModel, images: int, tokens: int, guided: bool) -> EncodedText:
    embeds = _empty(unet, images, tokens, unet.config["cross_attention_dim"])
    added = None
    if unet.config["addition_embed_type"] == "text_time":
        sizes = 6  # original size, crop, target size
        width = unet.config["projection_class_embeddings_input_dim"] - sizes * unet.config["addition_time_embed_dim"]
        added = {"text_embeds": _empty(unet, images, width), "time_ids": _empty(unet, images, sizes)}
    return EncodedText(embeds, torch.empty_like(embeds), added, added) if guided else EncodedText(embeds, None, added)


def _unet_kwargs(unet: UNet2DConditionModel, images: int) -> dict[str, Any]:
    width = unet.config["time_cond_proj_dim"]  # distilled models take the guidance scale as an input
    return {} if width is None else {"timestep_cond": _empty(unet, images, width)}


def _empty(unet: UNet2DConditionModel, *shape: int) -> Tensor:
    return torch.empty(shape, device=META, dtype=unet.dtype)


def _without_values(loaded: LoadedConcept) -> LoadedConcept:
    """A concept with factors on the meta device."""

    def on_meta(factors: LoraFactors) -> LoraFactors:
        sides = {side: getattr(factors, side) for side in ("down", "up", "left")}
        transform = factors.transform and replace(factors.transform, values=factors.transform.values.to(META))
        moved = {side: tensor.to(META) for side, tensor in sides.items() if tensor is not None}
        return replace(factors, **moved, transform=transform)

    lora = {name: on_meta(factors) for name, factors in loaded.factors.model.items()}
    return replace(loaded, factors=replace(loaded.factors, model=lora))
