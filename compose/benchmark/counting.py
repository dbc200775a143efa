"""Latent rows and FLOPs of a whole image: a method's full schedule, run without values on the meta device.

Text encoders, VAE and scheduler are not counted; they are the same for every method, up to the text encoders' LoRAs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from lora_compose.attention import Lora, SitePart, StepCaches, backbone_of, grid_at, install
from lora_compose.attention.device import uncompiled
from lora_compose.attention.sites import Grid
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.pipelines.attention_log import AttentionLog
from lora_compose.pipelines.canvas import Canvas, Step
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept
from lora_compose.pipelines.denoiser import Denoiser
from lora_compose.pipelines.guidance import ClassifierFree
from lora_compose.pipelines.inputs import ByImage
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.output import Cost
from lora_compose.pipelines.passes import AttentionMaps, Gradient, Loss, MapRequest, Pass, Prediction, Readout
from lora_compose.pipelines.prepared_pass import PreparedPass
from lora_compose.pipelines.sampler import Sampler, Schedule
from lora_compose.pipelines.session import Session
from lora_compose.pipelines.text.conditioning import TokenMasks
from lora_compose.pipelines.text.encoder import EncodedText, Prompts

META = torch.device("meta")


@dataclass(frozen=True)
class Counted:
    """The costs of one call.

    Attributes:
        rows_forward: Latent rows through the whole model.
        rows_stopped: Rows forward through passes that stop early.
        rows_backward: Rows run backward.
        flops: FLOPs of the whole call; a multiplication and an addition count as two.
        preparation_flops: FLOPs before the first denoising step.
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
    scheduler: Any = None,
    tokens: int = 77,
    vae_scale: int = 8,
    watched: AbstractContextManager[Any] | None = None,
) -> Counted:
    """Counts a call; where the cost depends on values, such as when updates end, the maximum is counted.

    Args:
        unet: On the meta device.
        concepts: The concepts; each has one token of the prompt, whatever its trigger.
        settings: The method; None is diffusers' own pipeline.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        image_size: Height and width in pixels.
        images: Images in the batch, of one prompt.
        scheduler: Says how many passes the steps need; DDIM, with one each, by default.
        tokens: Tokens of a prompt.
        vae_scale: Pixels per latent cell and side.
        watched: A context manager around the run, for example to watch its memory.

    Raises:
        ValueError: If the concepts lack something the method needs.
    """
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(steps)
    grid = image_size[0] // vae_scale, image_size[1] // vae_scale
    latents = torch.zeros(images, unet.config["in_channels"], *grid, dtype=unet.dtype)
    guided = guidance_scale > 1 and unet.config["time_cond_proj_dim"] is None
    text, unet_kwargs = _text(unet, images, tokens, guided), _unet_kwargs(unet, images)
    if settings is None:
        return _plain(unet, latents.to(META), text, unet_kwargs, len(scheduler.timesteps), watched)
    words = torch.eye(tokens, len(concepts)).roll(1, dims=0)[None]  # after the start token
    masks, operations, backbone = TokenMasks(words, words), Operations(), backbone_of(unet)
    # Everything except the model has values, on the CPU.
    canvas = Canvas(image_size, grid, 1, images, torch.device("cpu"), backbone)
    acting = ConceptSet(tuple(_without_numbers(concept) for concept in concepts))
    loras = [loaded.lora for loaded in acting.loaded]
    with (
        torch.no_grad(),
        watched or nullcontext(),
        install(backbone, loras, device=META, dtype=unet.dtype) as installed,
    ):
        sampler = Sampler(scheduler, Schedule(scheduler.timesteps, steps, scheduler.order))
        log, caches = AttentionLog(canvas, ()), StepCaches(backbone.model)
        inputs = {name: ByImage(one) for name, one in unet_kwargs.items()}
        denoiser = Denoiser(backbone, installed, sampler, canvas, acting, (), inputs, log, caches)
        prompts = Prompts(
            (" ".join(concept.concept.phrase for concept in concepts),), masks, acting,
            lambda weights, prompts, negative_prompts: text,
            lambda concepts, prompts, names, mentions: masks,
            (0,), canvas,
        )  # fmt: skip
        pricing = PricingDenoiser(denoiser, operations)
        cfg_scale, number = guidance_scale if guided else 1.0, len(scheduler.timesteps)
        process = settings.start(Session(acting, prompts, pricing, ClassifierFree(cfg_scale)))
        every = [sampler.schedule.step(i, cfg_scale) for i in range(number)]
        latents = process.prepare(latents, every[0])
        preparation = operations.flops
        for step in every:
            latents, _ = process.step(latents, step)  # scaled latents have the same shape
    cost = denoiser.cost
    return Counted(cost.rows_forward, cost.rows_stopped, cost.rows_backward, operations.flops, preparation)


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
    """Counts a call of a pipeline, without changing or running it.

    Args:
        pipe: A composing pipeline.
        settings: The method; None is diffusers' own pipeline.
        loaded: The concepts of the call.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        width: Pixels.
        height: Pixels.
        scheduler: Instead of the pipeline's; neither is changed.

    Raises:
        ValueError: If the concepts lack something the method needs.
    """
    scheduler, unet = scheduler or pipe.scheduler, uncompiled(pipe.unet)
    return count(
        meta_unet(unet.config), loaded, settings, steps, guidance_scale, (height, width),
        scheduler=type(scheduler).from_config(scheduler.config), tokens=pipe.tokenizer.model_max_length,
        vae_scale=pipe.vae_scale_factor,
    )  # fmt: skip


def meta_unet(config: Any) -> UNet2DConditionModel:
    """A UNet without values, on the meta device."""
    with META:
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return unet.eval()


@dataclass(frozen=True)
class Price:
    """The costs of one kind of pass, and the keys and values of text that it keeps, by micro-batch."""

    flops: int
    cost: Cost
    text_kv: Sequence[Mapping[str, tuple[Tensor, Tensor]]]


class PricingDenoiser:
    """Prices the passes of a method: of all passes with the same cost, it runs the first one, without values.

    Its results have values: predictions and gradients are 0, all losses are 1, so that no update ends early, and the
    attention to concept i lies in the ith column of the image.

    Args:
        denoiser: Runs passes on the meta device.
        operations: Counts FLOPs.
    """

    has_controlnet = False

    def __init__(self, denoiser: Denoiser, operations: Operations) -> None:
        self._denoiser = denoiser
        self._operations = operations
        self._prices: dict[tuple, Price] = {}
        self.canvas = denoiser.canvas
        self.log = denoiser.log
        self.sampler = denoiser.sampler

    def ahead(self, sampler: Sampler) -> "PricingDenoiser":
        """Prices steps that are taken ahead; it needs no sampler, so it is returned unchanged."""
        return self

    def fold(self, parts: Sequence[SitePart], weights: Sequence[float]) -> None:
        """Folds, and counts its FLOPs."""
        with self._operations:
            self._denoiser.fold(parts, weights)

    def prepare(self, spec: Pass, same_text_as: PreparedPass | None = None) -> PreparedPass:
        """Prepares a pass on the meta device."""
        return self._denoiser.prepare(replace(spec, regions=_moved(spec.regions)), same_text_as)

    def predict(
        self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest | None = None
    ) -> Prediction:
        """Prices a forward pass."""
        conditional, on_meta = not step.guided, _moved(request)
        run = partial(self._denoiser.predict, latents.to(META), step, prepared, on_meta)
        self._price(lambda: run, "predict", latents, step, prepared, request, conditional)
        text = prepared.spec.text.conditional() if conditional else prepared.spec.text
        output = latents.new_zeros(text.rows, *latents.shape[1:])
        return Prediction(output, text.roles, None if request is None else self._maps(request))

    def maps(self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest) -> AttentionMaps:
        """Prices a pass that stops early."""
        on_meta = _moved(request)
        run = partial(self._denoiser.maps, latents.to(META), step, prepared, on_meta)
        self._price(lambda: run, "maps", latents, step, prepared, request, conditional=True)
        return self._maps(request)

    def gradient(
        self,
        latents: Tensor,
        step: Step,
        prepared: PreparedPass,
        request: MapRequest,
        loss: Loss,
        *,
        whole: bool = False,
        readout: Readout | None = None,
    ) -> Gradient:
        """Prices a pass with a gradient, without the loss itself, which is small."""
        conditional, images = not (whole and step.guided), len(latents)

        def ready() -> Callable[[], object]:
            used = self._used(loss, request)

            def standing_in(maps: AttentionMaps) -> Tensor:
                found = [
                    one.sum()
                    for one, is_used in zip((maps.text, maps.cells), used, strict=True)
                    if is_used and one is not None
                ]
                return torch.stack(found).sum() + torch.zeros(images, device=META)

            on_meta = latents.to(META), step, prepared, _moved(request), standing_in
            return partial(self._denoiser.differentiate, *on_meta, whole=whole)

        self._price(ready, f"gradient, {whole}", latents, step, prepared, request, conditional)
        maps, text = self._maps(request), prepared.spec.text
        text = text.conditional() if conditional else text
        output = latents.new_zeros(text.rows, *latents.shape[1:])
        prediction = Prediction(output, text.roles, maps) if whole else None
        read = None if readout is None else readout(maps)
        return Gradient(torch.ones(images), torch.zeros(latents.shape), maps, prediction, read)

    def _used(self, loss: Loss, request: MapRequest) -> tuple[bool, bool]:
        """Whether a loss depends on the maps of text, and on those of self-attention."""
        text = self._maps(request).text
        cells = torch.rand(text.shape[-3], text.shape[-2], text.shape[-2]) if request.self_attention else None
        with torch.enable_grad():
            leaves = [one.clone().requires_grad_() for one in (text, cells) if one is not None]
            pulls = torch.autograd.grad(loss(AttentionMaps(*leaves)).sum(), leaves, allow_unused=True)
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
        batches = self._denoiser.micro_batches(prepared, step, conditional=conditional)
        kept = [{} if batch.inputs.text_kv is None else batch.inputs.text_kv.kept for batch in batches]
        kind = (
            what, latents.shape, tuple(batch.text.prompt_embeds.shape for batch in batches), _kind_of(prepared.spec),
            None if request is None else _kind_of_maps(request), tuple(map(bool, kept)),
        )  # fmt: skip
        if kind not in self._prices:
            flops, before, self._denoiser.cost = self._operations.flops, self._denoiser.cost, Cost()
            run = ready()
            with self._operations:
                run()
            spent, self._denoiser.cost = self._denoiser.cost, before
            self._prices[kind] = Price(self._operations.flops - flops, spent, [dict(one) for one in kept])
            self._operations.flops = flops
        price = self._prices[kind]
        self._operations.flops += price.flops
        self._denoiser.cost.add(price.cost)
        for mine, known in zip(kept, price.text_kv, strict=True):
            mine.update(known)

    def _maps(self, request: MapRequest) -> AttentionMaps:
        """Attention to concept i, whose word is token 1 + i, in the ith column of the image."""
        height, width = grid_at(self.canvas.latent_grid, self.canvas.map_level)
        count = len(self._denoiser.concepts.loaded)
        column = torch.arange(width) * count // width
        concept = request.tokens.argmax(dim=-2) - 1  # [(texts,) rows, maps]
        maps = (column[:, None] == concept[..., None, :]).float()  # [(texts,) rows, width, maps]
        maps = maps[..., None, :, :].expand(*concept.shape[:-1], height, -1, -1).flatten(-3, -2)
        return AttentionMaps(maps, output=None if request.output_layer is None else maps)


def _kind_of_maps(request: MapRequest) -> tuple:
    """What the cost of recording depends on."""
    return request.tokens.shape, request.self_attention, request.layer, request.output_layer


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
    """The same with all tensors on the meta device."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(map(_moved, value))
    if isinstance(value, Mapping):
        return {key: _moved(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _moved(getattr(value, one.name)) for one in fields(value)})
    return value


def _plain(
    unet: UNet2DConditionModel,
    latents: Tensor,
    text: EncodedText,
    unet_kwargs: Mapping[str, Any],
    passes: int,
    watched: AbstractContextManager[Any] | None,
) -> Counted:
    """What diffusers' own pipeline costs: the same pass again and again."""
    both = (
        [text.prompt_embeds]
        if text.negative_prompt_embeds is None
        else [text.negative_prompt_embeds, text.prompt_embeds]
    )
    embeds = torch.cat(both)
    with torch.no_grad(), Operations() as operations, watched or nullcontext():
        unet(
            torch.cat([latents] * len(both)), torch.tensor(1), embeds,
            added_cond_kwargs=text.added, **unet_kwargs,
        )  # fmt: skip
    return Counted(passes * len(embeds), 0.0, 0.0, passes * operations.flops, 0)


def _text(unet: UNet2DConditionModel, images: int, tokens: int, guided: bool) -> EncodedText:
    embeds = _empty(unet, images, tokens, unet.config["cross_attention_dim"])
    added = None
    if unet.config["addition_embed_type"] == "text_time":
        rows, sizes = images * (2 if guided else 1), 6  # original size, crop, target size
        width = unet.config["projection_class_embeddings_input_dim"] - sizes * unet.config["addition_time_embed_dim"]
        added = {"text_embeds": _empty(unet, rows, width), "time_ids": _empty(unet, rows, sizes)}
    return EncodedText(embeds, torch.empty_like(embeds) if guided else None, added)


def _unet_kwargs(unet: UNet2DConditionModel, images: int) -> dict[str, Any]:
    width = unet.config["time_cond_proj_dim"]  # distilled models take the guidance scale as an input
    return {} if width is None else {"timestep_cond": _empty(unet, images, width)}


def _empty(unet: UNet2DConditionModel, *shape: int) -> Tensor:
    return torch.empty(shape, device=META, dtype=unet.dtype)


def _without_numbers(concept: LoadedConcept) -> LoadedConcept:
    """The same concept with factors on the meta device."""
    return replace(concept, factors=replace(concept.factors, model=_shapes(concept.factors.model)))


def _shapes(lora: Lora) -> Lora:
    return {
        name: replace(
            factors,
            down=factors.down.to(META),
            up=factors.up.to(META),
            left=None if factors.left is None else factors.left.to(META),
        )
        for name, factors in lora.items()
    }
