"""Finds the files of the playground by name: in a clone of the repository, or inside an installed wheel."""

from pathlib import Path

from lora_compose.compose.support.names import did_you_mean

PLAYGROUND = "playground"
PLAYGROUND_FLUX = "playground-flux"
PLAYGROUNDS = (PLAYGROUND, PLAYGROUND_FLUX)
"""Models that come with lora-compose: a UNet, and a transformer of the same world."""


def playground_title(model: str) -> str:
    """The title in the metadata of LoRAs that were trained on a playground."""
    return f"lora-compose {model}"


def playground_of(title: str | None) -> str | None:
    """The playground whose LoRAs have this title in their metadata; None for others."""
    return next((model for model in PLAYGROUNDS if title == playground_title(model)), None)


_PACKAGE = Path(__file__).resolve().parents[1]


def assets_dir() -> Path:
    """`assets/` beside `compose/` in a clone, `compose/assets/` in a wheel. FileNotFoundError without a playground."""
    candidates = (_PACKAGE.parent / "assets", _PACKAGE / "assets")
    for candidate in candidates:
        if (candidate / "playground").is_dir():
            return candidate
    tried = " nor ".join(str(candidate / "playground") for candidate in candidates)
    raise FileNotFoundError(f"the assets of lora-compose are missing: neither {tried} is there; install it again")


def playground_model(name: str = PLAYGROUND) -> Path:
    """The model of one of `PLAYGROUNDS`, a folder for `from_pretrained`. FileNotFoundError without assets."""
    return assets_dir() / name / "model"


def playground_judge() -> Path:
    """The playgrounds' small CLIP that knows their concepts, for `from_pretrained`. FileNotFoundError without it."""
    folder = assets_dir() / PLAYGROUND / "judge"
    if not folder.is_dir():
        raise FileNotFoundError(f"the playground's judge is missing: {folder} is not there; install lora-compose again")
    return folder


def playground_lora(name: str, model: str = PLAYGROUND) -> Path:
    """A LoRA of a playground: of "cat" the ordinary one, of "cat-tara" the TARA LoRA, which the transformer lacks.

    Raises FileNotFoundError if the assets are missing, and ValueError if there is no LoRA of that name.
    """
    return _pick(_lora_files(model), name, "LoRA")


def lora_source(source: str) -> str:
    """The source of a concept's `lora`: the file of `playground:NAME`, everything else unchanged."""
    model, colon, name = source.partition(":")
    return str(playground_lora(name, model)) if colon and model in PLAYGROUNDS else source


def playground_loras(model: str = PLAYGROUND) -> list[str]:
    """Names of a playground's LoRAs. Raises FileNotFoundError if the assets are missing."""
    return sorted(_lora_files(model))


def playground_references(concept: str) -> list[Path]:
    """The reference images of a concept, which both playgrounds share, in the order of their numbers.

    Raises FileNotFoundError if the assets are missing, and ValueError if there is no concept of that name.
    """
    folders = {path.name: path for path in (assets_dir() / PLAYGROUND / "references").iterdir() if path.is_dir()}
    return sorted(_pick(folders, concept, "concept").glob("*.png"), key=lambda path: int(path.stem))


def _lora_files(model: str) -> dict[str, Path]:
    return {path.stem: path for path in (assets_dir() / model / "loras").glob("*.safetensors")}


def _pick(known: dict[str, Path], name: str, kind: str) -> Path:
    """Looks a name up among those that exist, so that no name can lead out of the assets."""
    if name not in known:
        raise ValueError(
            f"the playground has no {kind} {name!r}; it has: {', '.join(sorted(known))}{did_you_mean(name, known)}"
        )
    return known[name]


def ordinary(source: str) -> str:
    """The ordinary LoRA beside one of the playground's that was trained with TARA."""
    return source.removesuffix("-tara")
