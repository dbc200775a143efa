"""diffusers' caches, which let layers give again what they gave in an earlier step, with several passes in a step.

A cache tells passes apart by a context, or not at all: then it would give one pass what another has left. Here each
pass of a call has a memory of its own, and one whose layers are looked at computes all of them.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheDenoiserHook
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from diffusers.hooks.mag_cache import MagCacheHeadHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from torch import nn

from lora_compose.attention.device import hooked, modules_of

_BY_CONTEXT = (FBCHeadBlockHook, MagCacheHeadHook, TaylorSeerCacheHook)
_BY_COUNT = (FasterCacheBlockHook, FasterCacheDenoiserHook, PyramidAttentionBroadcastHook)


def _hooks(model: nn.Module) -> list[Any]:
    """The hooks of a model that keep something between steps."""
    holders = hooked(modules_of(model).values())
    hooks: list[ModelHook] = [hook for module in holders for hook in module._diffusers_hook.hooks.values()]
    return [hook for hook in hooks if hook._is_stateful]


def check_caches(model: nn.Module, *, differentiates: bool) -> None:
    """Checks the caches that are enabled in a model.

    Args:
        differentiates: Whether gradients are taken through it, or cells read the text of their region.

    Raises:
        ValueError: For caches that cannot be combined with concepts.
    """
    for hook in _hooks(model):
        name = type(hook).__name__
        advice = "call `disable_cache()` of the model, or take another cache: FirstBlockCache, TaylorSeer or MagCache"
        if isinstance(hook, FasterCacheDenoiserHook) and not hook.is_guidance_distilled:
            raise ValueError(
                "FasterCache leaves out the unconditional rows in some steps, and the LoRAs' gates are for all rows; "
                f"with a model whose guidance is distilled, give it is_guidance_distilled=True, otherwise {advice}"
            )
        if not isinstance(hook, _BY_CONTEXT + _BY_COUNT):
            raise ValueError(f"a cache of diffusers ({name}) cannot be combined with concepts: {advice}")
        if differentiates:
            raise ValueError(
                f"a cache of diffusers ({name}) leaves out layers that this method looks at in every step: call "
                "`disable_cache()` of the model, or use merge, tara or regional"
            )


class StepCaches:
    """The memories of a model's caches during a call, one for each pass."""

    def __init__(self, model: nn.Module) -> None:
        hooks = _hooks(model)
        kept = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        by_id = {id(manager): manager for manager in kept}
        self._managers: Sequence[Any] = tuple(by_id.values())
        self._counting: Sequence[Any] = tuple(hook for hook in hooks if isinstance(hook, _BY_COUNT))
        self._names: dict[Hashable, str] = {}
        self._states: dict[Hashable, Sequence[Any]] = {}

    @contextmanager
    def of(self, key: Hashable, *, anew: bool) -> Iterator[None]:
        """Inside this block the model's caches are those of one pass.

        Args:
            key: Stands for the pass; passes with other rows have other keys.
            anew: Whether all layers are to be computed, and what was kept is to be forgotten.
        """
        if not self._managers and not self._counting:
            yield
            return
        name = self._names.setdefault(key, f"pass {len(self._names)}")
        for manager in self._managers:
            if anew:
                manager._state_cache.pop(name, None)  # the states' own `reset` leaves some of it
            manager.set_context(CacheContext(name))
        for hook, state in zip(self._counting, self._states_of(key, anew), strict=True):
            hook.state = state
        try:
            yield
        finally:
            for manager in self._managers:
                manager.set_context(None)

    def _states_of(self, key: Hashable, anew: bool) -> Sequence[Any]:
        if key not in self._states and not self._states and not anew:
            self._states[key] = [hook.state for hook in self._counting]  # of the first pass: the hooks' own
        if key not in self._states or anew:
            self._states[key] = [_computing(hook) for hook in self._counting]
        return self._states[key]

    @classmethod
    @contextmanager
    def opened(cls, model: nn.Module) -> Iterator["StepCaches"]:
        """The caches of a model for a call; they keep nothing afterwards, also after an exception."""
        caches = cls(model)
        own = [hook.state for hook in caches._counting]
        try:
            yield caches
        finally:
            for hook, state in zip(caches._counting, own, strict=True):
                hook.state = state
                state.reset()
            for manager in caches._managers:
                manager.reset()


def _computing(hook: Any) -> Any:
    """A state of a hook that counts, at a count at which it computes."""
    state = type(hook.state)()
    state.iteration = getattr(hook, "block_skip_range", 0)
    return state
