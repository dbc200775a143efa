"""Backbones: what has to be known of each model class. One model family, one file."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from lora_compose.attention.claims import Journal
from lora_compose.attention.device import uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.sites import Site


class Backbone(Protocol):
    """Layers, grids, attention and forward pass of one model class (UNet or transformer). Holds no state of a call."""

    @property
    def model(self) -> nn.Module:
        """The model, compiled or not."""
        ...

    @property
    def sites(self) -> Mapping[str, Site]:
        """Every layer that a LoRA may adapt, by name."""
        ...

    @property
    def unread(self) -> Collection[str]:
        """Names of layers of `sites` whose output nothing reads: a LoRA has no effect there and learns nothing."""
        ...

    @property
    def same_input(self) -> Sequence[tuple[str, ...]]:
        """Names of layers that read the same input and that the attention set by `steer` runs together."""
        ...

    @property
    def levels(self) -> frozenset[int]:
        """Levels on which there are layers."""
        ...

    @property
    def map_level(self) -> int:
        """The level whose attention maps show where concepts are."""
        ...

    @property
    def map_layers(self) -> tuple[str, ...]:
        """Attention layers whose maps (image cells to text tokens) show where concepts are."""
        ...

    @property
    def word_layers(self) -> tuple[str, ...]:
        """All attention layers with maps of image cells to text tokens on the map grid, the map layers included."""
        ...

    @property
    def self_map_layers(self) -> tuple[str, ...]:
        """Self-attention layers whose maps show which cells attend to each other."""
        ...

    @property
    def text_layers(self) -> int:
        """Number of layers that can each read a text of their own."""
        ...

    @property
    def native_side(self) -> int:
        """Side of the latents at the model's native resolution, in cells."""
        ...

    @property
    def reads_regions(self) -> bool:
        """Whether cross-attention can read a different text in each region (`RegionAttention`)."""
        ...

    @property
    def joint(self) -> Site | None:
        """How text and image lie in one sequence, where the model attends to both together (`JointRegions`)."""
        ...

    @property
    def has_group_norms(self) -> bool:
        """Whether there are layers that take mean and variance over the whole canvas."""
        ...

    @property
    def unconditional_apart(self) -> bool:
        """Whether unconditional rows go through a network of their own, so that no batch has them beside others."""
        ...

    @property
    def hides_padding(self) -> bool:
        """Whether attention sees no token that the mask of the text leaves out, so that such tokens need not be run."""
        ...

    def steer(self, modules: Mapping[str, nn.Module], state: ForwardState, undo: Journal) -> None:
        """Replaces the attention among the model's modules by ours, which reads the state in every pass."""
        ...

    def truncated_after(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """Inside this block a forward pass may stop after the last of some layers; its output is meaningless."""
        ...

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """One forward pass. Backbones that read regions are told by `several_texts` that there are several texts.

        Args:
            latents: Scaled for the model. Shape: [rows, channels, height, width].
            t: The timestep, 0 to 1000.
            text: Shape: [rows, tokens, channels], or [texts, rows, tokens, channels] with several texts.
            added: Further inputs by row.

        Returns:
            The noise or velocity. Shape: as the latents.
        """
        ...


BACKBONES: Mapping[str, str] = {
    "ChromaTransformer2DModel": "chroma.ChromaBackbone",
    "CosmosTransformer3DModel": "cosmos.CosmosBackbone",
    "UNet2DConditionModel": "unet.UNetBackbone",
    "FluxTransformer2DModel": "flux.FluxBackbone",
    "Flux2Transformer2DModel": "flux2.Flux2Backbone",
    "Flux3Transformer2DModel": "flux3.Flux3Backbone",
    "Ideogram4Transformer2DModel": "ideogram4.Ideogram4Backbone",
    "Krea2Transformer2DModel": "krea2.Krea2Backbone",
    "QwenImageTransformer2DModel": "qwen_image.QwenImageBackbone",
    "ZImageTransformer2DModel": "z_image.ZImageBackbone",
}
"""File and class for each model class of diffusers. By name: programs with models of their own load none of them."""


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model; raises ValueError for models of a class that is not supported."""
    return backbone_class(type(uncompiled(model)))(model)


def backbone_class(kind: type) -> Any:
    """The class of the backbone for a model class; raises ValueError for one that is not supported."""
    for parent in kind.__mro__:
        if parent.__name__ in BACKBONES and parent.__module__.startswith("diffusers."):
            file, name = BACKBONES[parent.__name__].split(".")
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise ValueError(f"a {kind.__name__} is not supported; expected {', '.join(BACKBONES)}")
