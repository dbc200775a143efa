"""What the files of a model say before it is opened: its family, its parts' configurations, its own size."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import list_repo_files, snapshot_download
from torch import nn

from lora_compose.attention.backbones import backbone_class
from lora_compose.compose.files.paths import INDEXES, ModelError, model_source
from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUNDS, playground_model
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.opening import checkpoint_keys
from lora_compose.pipelines.families.unets import UNetPipeline
from lora_compose.pipelines.support.hub import asking, reachable

_CONFIGS = (*INDEXES, "*/config.json", "*/scheduler_config.json")
_GUIDANCE_EMBEDDING = "guidance_in."  # keys of FLUX.1 checkpoints whose guidance is distilled


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model that has not been opened.

    Attributes:
        family: The pipeline class that would open it.
        index: Its `model_index.json`; empty for a checkpoint in one file.
        parts: The configuration of each component by its name, as far as there is one.
        files: Paths of its files, relative to its folder; empty for a checkpoint in one file.
        name: Of its folder, file or hub repository, without the folders or the user before it.
        shipped: Whether it is one of the small models that come with lora-compose.
    """

    family: Any
    index: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    name: str = ""
    shipped: bool = False

    @property
    def has_unet(self) -> bool:
        """Whether its denoiser is a UNet."""
        return issubclass(self.family, UNetPipeline)

    @property
    def reads_regions(self) -> bool:
        """Whether its attention can read a different text in each region."""
        return self.has_unet or backbone_class(self.family.transformer_class).reads_regions

    @property
    def latent_cell(self) -> int | None:
        """Side of a latent cell in pixels, as the pipeline's `vae_scale_factor`; None if its VAE does not say it."""
        vae = self.parts.get("vae", {})
        if blocks := vae.get("block_out_channels"):
            return 2 ** (len(blocks) - 1)
        halved = vae.get("temperal_downsample")  # of VAEs for videos
        return 2 ** len(halved) if halved else None

    @property
    def own_size(self) -> tuple[int, int] | None:
        """Width and height of its own images, as of the pipeline; None without the configurations that say it."""
        vae = self.parts.get("vae", {})
        if not self.has_unet:
            side = self.family.own_side(vae)
            return (side, side) if vae or self.family.native_side else None
        sample, cell = self.parts.get("unet", {}).get("sample_size"), self.latent_cell
        if sample is None or cell is None:
            return None
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * cell, height * cell

    def denoiser(self, dtype: str) -> nn.Module | None:
        """The denoiser without weights, in a precision; None without its configuration."""
        name, kind = ("unet", UNet2DConditionModel) if self.has_unet else ("transformer", self.family.transformer_class)
        config = self.parts.get(name, {})
        return _without_weights(kind, json.dumps(config), dtype) if "_class_name" in config else None


@lru_cache(maxsize=2)  # the scenes of a batch have the same one
def _without_weights(kind: Any, config: str, dtype: str) -> nn.Module:
    with torch.device("meta"):
        model = kind.from_config(json.loads(config))
    return nn.Module.to(model, getattr(torch, dtype))  # diffusers' own warns of layers that it keeps in float32


@contextmanager
def model_errors(model: str) -> Iterator[None]:
    """Inside this block files of a model are read; what goes wrong is a `ModelError`, but for too little memory."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except ConnectionError as error:
        raise ModelError(f"{error}; {PLAYGROUND} is a small model that comes with lora-compose") from error
    except Exception as error:  # model files are not trusted, and libraries raise many kinds of errors
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"the model {model!r} cannot be opened: {reason[:600]}") from error


def facts_of(model: str) -> ModelFacts:
    """The facts of a model that a run names; of a hub repository only its configurations are downloaded.

    Raises:
        ModelError: If there is no such model, or none of a family that is supported, or its files cannot be read.
    """
    with model_errors(model):
        return _facts_of(model)


def _facts_of(model: str) -> ModelFacts:
    source = model_source(model)
    if source.is_file():
        keys = checkpoint_keys(source, {})
        guided = {"guidance_embeds": any(_GUIDANCE_EMBEDDING in key for key in keys)}
        return ModelFacts(ComposePipeline.family_of_keys(keys), parts={"transformer": guided}, name=source.stem)
    if source.is_dir():
        files = tuple(sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()))
        own = source.resolve() in {playground_model(name).resolve() for name in PLAYGROUNDS}
        return replace(_of_folder(source, files), name=source.absolute().name, shipped=own)
    options = reachable(model, *INDEXES)
    with asking(model, **options):
        folder = Path(snapshot_download(model, allow_patterns=list(_CONFIGS), **options))
        here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        files = here if options else list_repo_files(model)
    return replace(_of_folder(folder, tuple(sorted(files))), name=model.rpartition("/")[2])


def _of_folder(folder: Path, files: tuple[str, ...]) -> ModelFacts:
    index, parts = index_of(folder), {}
    for name in index:
        for config in ("config.json", "scheduler_config.json"):
            if (path := folder / name / config).is_file():
                parts[name] = _read(path)
    return ModelFacts(ComposePipeline.family_of(index), index, parts, files)


def index_of(folder: Path) -> Mapping[str, Any]:
    """What a model's folder says that it is; empty if nothing. Raises ValueError if it cannot be read."""
    return next((_read(folder / name) for name in INDEXES if (folder / name).is_file()), {})


def _read(path: Path) -> Mapping[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings by name")
    return content
