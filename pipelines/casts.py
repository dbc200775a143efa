"""Prompts with different concepts, for methods that divide the canvas among them: a process for each cast.

Such methods have texts, regions and maps of their own for every cast, so they cannot share passes. The images are those
of one call for each prompt, and cost as much; prompts with the same cast go through the model together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_compose.attention import Derived, Layout, Recorder, among
from lora_compose.attention.gates import Gates
from lora_compose.attention.install import Installation
from lora_compose.attention.layers import Kind
from lora_compose.pipelines.conditioning import TokenMasks, join_images
from lora_compose.pipelines.engine import EncodedText, Encoder, Engine

if TYPE_CHECKING:
    from lora_compose.pipelines.methods.process import Process


class CastEngine(Engine):
    """An engine for those prompts of a call that have the same concepts; what it installs is installed for all.

    Args:
        whole: The engine of the call, with all concepts.
        prompts: Which of its prompts.

    Attributes:
        cast: Which of its concepts these prompts have.
        batch: Which images of the call these are.
    """

    def __init__(self, whole: Engine, prompts: Sequence[int]) -> None:
        cast, count = list(whole.members[prompts[0]]), whole.images_per_prompt
        self.batch = [prompt * count + image for prompt in prompts for image in range(count)]
        self._whole = whole
        self.cast = cast
        self._among_all = Derived()
        masks = whole.token_masks
        super().__init__(
            whole.components,
            [whole.loaded[i] for i in cast],
            _of_prompts(whole.encoder, prompts, len(whole.members), self.batch),
            whole.finder,
            None if whole.prompts is None else [whole.prompts[prompt] for prompt in prompts],
            TokenMasks(masks.trigger[prompts][..., cast], masks.phrase[prompts][..., cast]),
            latent_grid=whole.latent_grid,
            image_size=whole.image_size,
            images_per_prompt=count,
            guidance_scale=whole.guidance_scale,
            guidance_rescale=whole.guidance_rescale,
            device=whole.device,
            unet_kwargs=_of_images(whole.unet_kwargs, self.batch),
            started=whole.started,
            guides=[guide.of_images(self.batch) for guide in whole.guides],
        )
        self.cost = whole.cost
        self.timesteps = whole.timesteps
        self.record_steps = whole.record_steps

    @property
    def installation(self) -> Installation:
        """What is installed in the UNet: the concepts of all prompts."""
        return self._whole.installation

    def fold(self, kinds: Sequence[Kind], weights: Sequence[float]) -> None:
        """Nothing: what is constant for these prompts is not for the others."""

    def follow(self) -> None:
        """Goes to the step of the call, in which a callback may have switched guidance off."""
        self.step, self.guidance_scale = self._whole.step, self._whole.guidance_scale

    def keep_maps(self, maps: Tensor, seen: Tensor) -> None:
        """Keeps them with those of the call."""
        self._whole.keep_maps(self._in_batch(self._of_all(maps)), self._in_batch(seen))

    def keep_masks(self, masks: Tensor, images: Sequence[int] | None = None) -> None:
        """Keeps them with those of the call."""
        batch = self.batch if images is None else [self.batch[image] for image in images]
        self._whole.keep_masks(self._of_all(masks), batch)

    def _of_all(self, maps: Tensor) -> Tensor:
        """Maps among those of all concepts. Shape: [images, concepts, height, width]."""
        return among(maps.movedim(1, -1), self.cast, len(self._whole.concepts)).movedim(-1, 1)

    def _in_batch(self, maps: Tensor) -> Tensor:
        """Maps among those of all images. Shape: [images, ...]."""
        every = maps.new_zeros(self._whole.images, *maps.shape[1:])
        every[self.batch] = maps
        return every

    def _use(self, gates: Gates, text: Tensor, recorders: Sequence[Recorder], layout: Layout | None) -> None:
        every = self._among_all.of(gates, lambda mine: mine.among(self.cast, len(self._whole.concepts)))
        super()._use(every, text, recorders, layout)


def _of_prompts(encode: Encoder, chosen: Sequence[int], prompts: int, images: Sequence[int]) -> Encoder:
    """An encoder of some prompts of a call; it encodes as many as the call has, and drops the others."""

    def placed(texts: Sequence[str] | None) -> list[str] | None:
        if texts is None:
            return None
        found = dict(zip(chosen, texts, strict=True))
        return [found.get(prompt, texts[0]) for prompt in range(prompts)]

    def encode_some(texts: Sequence[str] | None, negative_texts: Sequence[str] | None) -> EncodedText:
        return encode(placed(texts), placed(negative_texts)).of_images(images)

    return encode_some


def _of_images(unet_kwargs: Mapping[str, object], images: Sequence[int]) -> Mapping[str, object]:
    """Further arguments of the UNet for some images; tensors have one row for each."""
    return {name: given[images] if isinstance(given, Tensor) else given for name, given in unet_kwargs.items()}


@dataclass(frozen=True)
class ByCast:
    """A process for each cast of a call.

    Attributes:
        engine: That of the call.
        casts: An engine and a process for each.
    """

    engine: Engine
    casts: "Sequence[tuple[CastEngine, Process]]"

    @classmethod
    def start(cls, engine: Engine, start: "Callable[[Engine], Process]") -> "ByCast":
        """Starts a process for each cast.

        Args:
            engine: That of the call.
            start: Starts one of them.
        """
        prompts: dict[tuple[int, ...], list[int]] = {}
        for prompt, cast in enumerate(engine.members):
            prompts.setdefault(cast, []).append(prompt)
        parts = [CastEngine(engine, mine) for mine in prompts.values()]
        casts = [(part, start(part)) for part in parts]
        texts = [part.conditioning.among(part.cast, len(engine.concepts)) for part in parts]
        engine.conditioning = join_images(texts, [part.batch for part in parts])
        return cls(engine, casts)

    def prepare(self, latents: Tensor) -> Tensor:
        """Each its own images."""
        return self._joined(process.prepare(_of_batch(latents, part.batch)) for part, process in self.casts)

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Each its own images."""
        steps = []
        for part, process in self.casts:
            part.follow()
            steps.append(process.step(_of_batch(latents, part.batch), t))
        moved, outputs = zip(*steps, strict=True)
        return self._joined(moved), self._joined(outputs)

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """The images of all casts in the order of the call."""
        order = [image for part, _ in self.casts for image in part.batch]
        return _of_batch(torch.cat(list(parts)), sorted(range(len(order)), key=order.__getitem__))


def _of_batch(batch: Tensor, images: Sequence[int]) -> Tensor:
    """Some images of a batch, in this order. An index tensor would have to be copied to the device in every step."""
    return torch.cat([batch[image : image + 1] for image in images])
