"""What is on this machine: models in folders and in the hub's cache, and LoRAs as their headers describe them."""

from dataclasses import dataclass
from pathlib import Path

from lora_compose.compose.generate.model_facts import index_of
from lora_compose.compose.page.store import SUFFIX, ShownLora, beside, described, in_folder
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.opening import checkpoint_keys
from lora_compose.pipelines.formats.files import LoraError, read_words
from lora_compose.pipelines.formats.safetensors_reader import read_header
from lora_compose.pipelines.support.regular import open_regular

_CHECKPOINT = ("model.diffusion_model.", "double_blocks.")  # keys of models in one file, which LoRAs do not have


@dataclass(frozen=True)
class KnownModel:
    """A model that can be chosen: its source, as a run names it, and where it is, in words."""

    source: str
    family: str
    where: str

    @property
    def words(self) -> str:
        """The model's name, family and place in a line."""
        name = Path(self.source).name if Path(self.source).is_absolute() else self.source
        return f"{name} · {self.family} · {self.where}"


OWN = (
    KnownModel(PLAYGROUNDS[0], "small UNet", "comes with lora-compose"),
    KnownModel(PLAYGROUNDS[1], "small transformer", "comes with lora-compose"),
)
"""The small models."""

PUBLISHED = (
    KnownModel("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.x and 2.x", "to download"),
    KnownModel("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL", "to download"),
    KnownModel("black-forest-labs/FLUX.1-dev", "FLUX.1", "to download"),
    KnownModel("Tongyi-MAI/Z-Image", "Z-Image", "to download"),
)
"""A published model of each family that is used most."""


def models_in(folder: Path) -> list[KnownModel]:
    """The models in a folder: it, those inside of it, and checkpoints in one file. FileError if it is unreadable."""
    files = in_folder(folder)
    where = f"in {folder.name or folder}"
    saved = [(inside, _family(inside)) for inside in (folder, *sorted(filter(Path.is_dir, folder.iterdir())))]
    every = [*saved, *((path, _family_of_file(path)) for path in files)]
    return [KnownModel(str(path), family, where) for path, family in every if family is not None]


def cached_models(cache: Path) -> list[KnownModel]:
    """The repositories in the hub's cache whose weights are there, not their configurations alone."""
    families = {}
    for folder in sorted(cache.glob("models--*--*/snapshots/*")):
        _, owner, name = folder.parents[1].name.split("--", 2)
        if (family := _family(folder)) is not None and any(folder.glob(f"*/*{SUFFIX}")):
            families[f"{owner}/{name}"] = family
    return [KnownModel(source, family, "in the hub's cache") for source, family in families.items()]


def shown_lora(path: Path) -> ShownLora:
    """A LoRA as its header describes it, weights unchecked. Raises LoraError if it has no readable header."""
    words = read_words(path)
    try:
        with open_regular(path) as file:
            header = read_header(file)
    except (OSError, ValueError) as error:  # it has changed since its words were read
        raise LoraError(f"{path.name} cannot be read: {error}") from error
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    return described(str(path), path.name, words, shapes, header.metadata, beside(path))


def _family_of_file(path: Path) -> str | None:
    """The family of a checkpoint; None for LoRAs and whatever else is no model."""
    try:
        keys = checkpoint_keys(path, {})
        return ComposePipeline.family_of_keys(keys).family if any(key.startswith(_CHECKPOINT) for key in keys) else None
    except Exception:  # files are not trusted: whatever errors they cause, the others are listed
        return None


def _family(folder: Path) -> str | None:
    """The family of a model by what its folder says; None if it is none that is supported."""
    try:
        return ComposePipeline.family_of(index_of(folder)).family
    except (OSError, ValueError):
        return None
