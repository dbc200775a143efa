"""Families that diffusers has as a modular pipeline only: a class that holds its components, and runs it."""

import os
from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar, Self

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from lora_compose.pipelines.calls.call import refuse_unknown
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import TemplatePipeline
from lora_compose.pipelines.families.opening import HUB_OPTIONS
from lora_compose.pipelines.families.quantised import cast
from lora_compose.pipelines.images.from_image import FromImage


class ModularFamilyPipeline(TemplatePipeline):
    """The components of a modular pipeline of diffusers, in calls that may name concepts."""

    modular_class: ClassVar[Any] = ModularPipeline
    """diffusers' modular pipeline."""

    tells_steps = False

    @classmethod
    def _plain_class(cls) -> Any:
        return cls.modular_class

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        return config.get("_class_name") == cls.modular_class.__name__

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, quantize: str | None = None, **options: Any
    ) -> "ComposePipeline":
        """Opens a folder or hub repository with a `modular_model_index.json`.

        Args:
            options: Options of `ModularPipeline.from_pretrained` for the hub, and of `load_components`, such as
                `dtype`.

        Raises:
            ValueError: If `quantize` is another than fp8.
        """
        if quantize not in (None, "fp8"):
            raise ValueError(f"models of {cls.family} are opened with quantize='fp8' or without, not {quantize!r}")
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        modular: Any = cls.modular_class.from_pretrained(pretrained_model_name_or_path, **hub)
        modular.load_components(cls._parts(), **options)
        return cast(cls.of_modular(modular), quantize)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline | ModularPipeline, **options: Any) -> Self:
        """The components in another pipeline of this class."""
        given = [options.pop(name) for name in ("dtype", "torch_dtype") if name in options]
        made, dtype = cls.of_modular(pipeline), next(iter(given), None)
        refuse_unknown([*options], cls.from_pipe)
        return made if dtype in (None, made.dtype) else made.to(dtype)

    @classmethod
    def of_modular(cls, modular: DiffusionPipeline | ModularPipeline) -> Self:
        """The components of a modular pipeline, in a composing one; raises ValueError if some are not loaded."""
        parts = {name: getattr(modular, name, None) for name in cls._parts()}
        if missing := [name for name, part in parts.items() if part is None]:
            raise ValueError(f"the pipeline has no {', '.join(missing)}; call its load_components() first")
        return cls(**parts)

    @classmethod
    def _parts(cls) -> list[str]:
        """The names of its components."""
        return list(signature(cls.__init__).parameters)[1:]

    def modular(self) -> Any:
        """Diffusers' modular pipeline with the same components."""
        pipe = self._blocks().init_pipeline()
        pipe.update_components(**self.components)
        return pipe

    @classmethod
    def _blocks(cls) -> Any:
        """The blocks of that pipeline."""
        raise NotImplementedError

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """As diffusers' modular pipeline does, which opens the folder as well."""
        if options.pop("use_flashpack", False):
            raise ValueError("diffusers' modular pipelines are not saved with use_flashpack; leave it out")
        self.modular().save_pretrained(str(save_directory), *args, **{"overwrite_modular_index": True, **options})

    @property
    def guidance_scale(self) -> float:
        """The scale of the call in progress, or of the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call in progress, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress is to stop."""
        return self._interrupt

    def _as_diffusers(self, arguments: dict[str, Any], start: FromImage | None, unknown: Mapping[str, Any]) -> Any:
        """A call without concepts: exactly what the modular pipeline does."""
        arguments = self._plain_arguments(arguments, start)
        if start is not None:
            self._check_plain_start(start, arguments)
            arguments |= start.arguments
        if arguments.pop("callback_on_step_end") is not None:
            raise ValueError("diffusers' modular pipelines have no callbacks; leave out callback_on_step_end")
        del arguments["callback_on_step_end_tensor_inputs"]
        scale, named = arguments.pop("guidance_scale", None), arguments.pop("return_dict")
        as_latents = arguments["output_type"] == "latent"
        if as_latents:
            del arguments["output_type"]
        pipe = self.modular()
        _set_progress_bars(pipe._blocks, getattr(self, "_progress_bar_config", {}))
        self._prepare_plain(pipe)
        if scale is not None:
            pipe.update_components(guider=pipe.guider.new(guidance_scale=scale))
        images = pipe(**arguments, output="latents" if as_latents else "images")
        return ImagePipelineOutput(images=images) if named else (images,)

    @classmethod
    def strength_for(cls, given: float | None, inpaints: bool) -> float:
        """As `ImageTasksPipeline.strength_for`."""
        cls.task_for(inpaints)
        (default,) = (argument.default for argument in cls._blocks().inputs if argument.name == "strength")
        return default if given is None else given

    def _check_composed_arguments(self, given: Mapping[str, Any], guidance_scale: float) -> None:
        """Raises ValueError for arguments that do not go with concepts."""
        if given["prompt"] is None:
            raise ValueError(f"{self.family} needs a prompt; it cannot be given embeddings")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1 with concepts, and it is {guidance_scale}")
        if given["max_sequence_length"] < 1:
            raise ValueError(f"max_sequence_length must be at least 1, not {given['max_sequence_length']}")

    def _prepare_plain(self, pipe: ModularPipeline) -> None:
        """Changes a modular pipeline for a call without concepts."""


def _set_progress_bars(block: Any, options: Mapping[str, Any]) -> None:
    """Sets the progress bars of a block and of all blocks in it; diffusers' pipelines reach the outermost ones only."""
    if hasattr(block, "set_progress_bar_config"):  # it has a loop
        block.set_progress_bar_config(**options)
    for inner in block.sub_blocks.values():
        _set_progress_bars(inner, options)
