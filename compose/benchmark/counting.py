"""What a whole image costs in UNet rows and FLOPs: a method's full schedule, run without numbers on the meta device.

Text encoders, VAE and scheduler are not counted; they are the same for every method, up to the text encoders' LoRAs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lora_compose.attention import Gates, Layout, Lora, Recorder
from lora_compose.attention.layers import Grid, uncompiled
from lora_compose.pipelines.conditioning import Conditioning, TokenMasks
from lora_compose.pipelines.engine import EncodedText, Engine, Gradient, LoadedConcept, Objective
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.output import Cost

META = torch.device("meta")


@dataclass(frozen=True)
class Counted:
    """What one call costs.

    Attributes:
        rows_forward: Latent rows through the whole UNet.
        rows_stopped: Rows forward through passes that stop early.
        rows_backward: Rows run backward.
        flops: Operations of the whole call, a multiplication and an addition being two.
        preparation_flops: Those of them before the first denoising step.
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
    """Counts a call; what depends on numbers, as when to stop updating latents, is counted as the most that can be.

    Args:
        unet: On the meta device.
        concepts: Who takes part; every one has one token of the prompt, whatever its trigger.
        settings: The method; None is diffusers' own pipeline.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        image_size: Height and width in pixels.
        images: Images in the batch, of one prompt.
        scheduler: Says how many passes the steps need; DDIM, with one each, by default.
        tokens: Tokens of a prompt.
        vae_scale: Pixels per latent cell and side.
        watched: Entered for the run, such as what watches the memory that it takes.

    Raises:
        ValueError: If the concepts lack something the method needs.
    """
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(steps)
    grid = image_size[0] // vae_scale, image_size[1] // vae_scale
    latents = _empty(unet, images, unet.config["in_channels"], *grid)
    guided = guidance_scale > 1 and unet.config["time_cond_proj_dim"] is None
    text, unet_kwargs = _text(unet, images, tokens, guided), _unet_kwargs(unet, images)
    if settings is None:
        return _plain(unet, latents, text, unet_kwargs, len(scheduler.timesteps), watched)
    words = torch.eye(tokens, len(concepts)).roll(1, dims=0)[None]  # after the start token
    operations = Operations()
    engine = _Engine(
        operations,
        {"unet": unet, "scheduler": scheduler},
        [_without_numbers(concept) for concept in concepts],
        lambda prompts, negative_prompts: text,
        lambda concepts, prompts, names, mentions: TokenMasks(words, words),
        [" ".join(concept.concept.phrase for concept in concepts)],
        TokenMasks(words, words),
        latent_grid=grid,
        image_size=image_size,
        images_per_prompt=images,
        guidance_scale=guidance_scale,
        guidance_rescale=0.0,
        device=META,
        unet_kwargs=unet_kwargs,
        started=0.0,
    )
    with torch.no_grad(), operations, watched or nullcontext(), engine.installed():
        engine.timesteps = scheduler.timesteps
        process = settings.start(engine)
        latents = process.prepare(latents)
        preparation = operations.flops
        for engine.step, t in enumerate(scheduler.timesteps):
            latents, _ = process.step(latents, t)  # what the scheduler makes of them has the same shape
    cost = engine.cost
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
    """Counts a call of a pipeline, of which nothing is changed or run.

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
    """A UNet without numbers, on the meta device."""
    with META:
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return unet.eval()


class Operations(TorchDispatchMode):
    """Counts FLOPs inside a `with` block by the formulas of PyTorch's `FlopCounterMode`.

    That one overlooks `addmm_`, with which the bank adds its deltas. And operations on meta tensors, which give a shape
    and nothing else, are worked out by PyTorch in Python, slowly; here once for every operation and kind of input, for
    as long as the program runs.

    Attributes:
        flops: What has been counted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tuple(_leaves((*args, *kwargs.values())))
        kind = func, tuple(kwargs), tuple(map(_kind, leaves))
        if kind in _known:
            again, flops = _known[kind]
            self.flops += flops
            return again(func, args, kwargs)
        out = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, out)
        self.flops += flops
        if all(leaf.is_meta for leaf in (*leaves, *_leaves([out])) if isinstance(leaf, Tensor)):
            _known[kind] = _again(func, out), flops
        return out


_FORMULAS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
_known: dict[tuple, tuple[Callable[[Any, tuple, dict], Any], int]] = {}


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    formula = _FORMULAS.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _again(func: Any, out: Any) -> Callable[[Any, tuple, dict], Any]:
    """How to get what an operation gives when it has the same kind of input again."""
    shared = [result.alias_info for result in func._schema.returns if result.alias_info]
    if not shared:
        template = _like(out)  # the result itself may become part of a graph
        return lambda func, args, kwargs: _like(template)
    if func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return lambda func, args, kwargs: args[0]
    return lambda func, args, kwargs: func(*args, **kwargs)


def _leaves(values: Iterable) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield len(value)
            yield from _leaves(value)
        else:
            yield value


def _kind(leaf: Any) -> tuple:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _like(result: Any) -> Any:
    if isinstance(result, Tensor):
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
    return type(result)(map(_like, result)) if isinstance(result, list | tuple) else result


@dataclass(frozen=True)
class _Pass:
    """What a UNet pass leaves behind, and what it has cost."""

    flops: int
    output: Tensor
    text_kv: Mapping[str, tuple[Tensor, Tensor]]
    maps: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Update:
    """What a pass with a gradient gives, and what it has cost."""

    flops: int
    cost: Cost
    gradient: Gradient
    maps: Mapping[str, Tensor]


class _Engine(Engine):
    """An engine without numbers: of all passes that cost the same, it runs the first.

    Of passes with a gradient as well, with all that belongs to it.
    """

    def __init__(self, operations: Operations, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._operations = operations
        self._passes: dict[tuple, _Pass] = {}
        self._begun: dict[tuple, tuple[float, ...]] = {}
        self._updates: dict[tuple, _Update] = {}

    def read(self, numbers: Tensor) -> Tensor:
        """Ones: the gradient is finite, and no loss rises, which would end updates."""
        return torch.ones(numbers.shape)

    def found(self, masks: Tensor) -> Tensor:
        """A column of the picture for each concept."""
        _, concepts, _, width = masks.shape
        column = torch.arange(width) * concepts // width
        return (column == torch.arange(concepts)[:, None])[None, :, None].expand(masks.shape)

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
        kind = latents.shape, conditioning, gates, layout, whole
        what = latents, t, conditioning, gates, record, objective, layout
        weights = self.step_weights
        if self._begun.get(kind) != weights:  # the first of a kind, or of other weights, makes keys and values
            self._begun[kind] = weights
            return super().gradient(*what, whole=whole)
        if kind not in self._updates:
            before, self.cost = (self._operations.flops, self.cost), Cost()
            gradient = super().gradient(*what, whole=whole)
            self._updates[kind] = _Update(self._operations.flops - before[0], self.cost, gradient, dict(record.maps))
            self._operations.flops, self.cost = before
        known = self._updates[kind]
        self._operations.flops += known.flops
        self.cost.rows_forward += known.cost.rows_forward
        self.cost.rows_stopped += known.cost.rows_stopped
        self.cost.rows_backward += known.cost.rows_backward
        record.maps.update(known.maps)
        return known.gradient

    def _run(self, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance: Mapping[str, Any]) -> Tensor:
        if torch.is_grad_enabled():
            return super()._run(latents, t, conditioning, guidance)
        slot = self.installation.slot
        text_kv = {} if slot.text_kv is None else slot.text_kv.kept
        recorded = tuple((recorder.layers, recorder.readout.shape) for recorder in slot.recorders)
        bank = frozenset((name, layer.key) for name, layer in self.installation.bank.items())
        text = conditioning.prompt_embeds.shape
        kind = latents.shape, text, bank, frozenset(text_kv), recorded, slot.layout, len(self._unet.up_blocks)
        if kind not in self._passes:
            before = self._operations.flops
            output = super()._run(latents, t, conditioning, guidance)
            maps = [dict(recorder.maps) for recorder in slot.recorders]
            self._passes[kind] = _Pass(self._operations.flops - before, output, dict(text_kv), maps)
            return output
        known = self._passes[kind]
        self._operations.flops += known.flops
        text_kv.update(known.text_kv)
        for recorder, maps in zip(slot.recorders, known.maps, strict=True):
            recorder.maps.update(maps)
        return known.output


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
            added_cond_kwargs=text.added_cond_kwargs, **unet_kwargs,
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
    """The same concept with the shapes of its factors only."""
    return replace(concept, factors=replace(concept.factors, unet=_shapes(concept.factors.unet)))


def _shapes(lora: Lora) -> Lora:
    return {
        name: replace(factors, down=factors.down.to(META), up=factors.up.to(META)) for name, factors in lora.items()
    }
