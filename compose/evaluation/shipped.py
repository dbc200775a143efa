"""The suites that are shipped with the package."""

from pathlib import Path

from lora_compose.compose.files.reading import FileError
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.compose.support.names import did_you_mean, file_near
from lora_compose.pipelines.support.home import expanded


def suites_dir() -> Path:
    """The folder of shipped suites."""
    return assets_dir() / "suites"


def published_dir() -> Path:
    """The folder of shipped suites whose models are downloaded."""
    return suites_dir() / "published"


def find_suite(name: str, folder: Path | None = None) -> Path:
    """The file of a suite, given by path or by the name of a suite that is shipped in a folder, or in `suites_dir`.

    Raises:
        FileError: If there is neither; the message lists the names.
    """
    path = expanded(name)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        if not path.exists():
            raise FileError(f"there is no file {name!r}{file_near(path)}")
        return path
    shipped = {file.stem: file for file in sorted((folder or suites_dir()).glob("*.yaml"))}
    if name not in shipped:
        there = f"give a file (YAML or JSON), or one of {', '.join(shipped)}{did_you_mean(name, shipped)}"
        raise FileError(f"there is no suite {name!r}; {there}")
    return shipped[name]
