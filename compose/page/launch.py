"""`lora-compose ui`: starts the page."""

import importlib.util
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.network import is_local, url_of
from lora_compose.compose.support.terminal import echo

SCREEN = Path(__file__).resolve().parent / "screen" / "page.py"
"""The script that Streamlit runs for each session."""

_PACKAGE = SCREEN.parents[2]
_OUT, _LORAS, _LOCAL = "LORA_COMPOSE_OUT", "LORA_COMPOSE_LORAS", "LORA_COMPOSE_LOCAL"
_MODEL = "LORA_COMPOSE_MODEL"


@dataclass(frozen=True)
class Options:
    """How the page was started; passed in environment variables, since Streamlit runs the script anew for each session.

    Attributes:
        local: Whether only this machine can open the page; files may then be named by path.
        model: The model that each session begins with.
    """

    out: Path = Path("outputs")
    loras: Path | None = None
    local: bool = False
    model: str = PLAYGROUND

    @property
    def images(self) -> Path:
        """The folder for saved images."""
        return self.out / "page"


def options() -> Options:
    """How this page was started."""
    loras = os.environ.get(_LORAS)
    return Options(
        Path(os.environ.get(_OUT, "outputs")),
        Path(loras) if loras else None,
        os.environ.get(_LOCAL) == "yes",
        os.environ.get(_MODEL, PLAYGROUND),
    )


def start(model: str, port: int, host: str, out: Path, loras: Path | None, browser: bool) -> None:
    """Starts the page in this process, until a signal. ValueError if Streamlit, the folder or the model is missing."""
    if importlib.util.find_spec("streamlit") is None:
        raise ValueError("the page needs one more package: pip install 'lora-compose[ui]'")
    if loras is not None and not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}; --loras names a folder with safetensors files")
    model_source(model)
    environment = {_OUT: str(out.absolute()), _LOCAL: "yes" if is_local(host) else "no", _MODEL: model}
    environment |= {_LORAS: str(loras.absolute())} if loras is not None else {}
    os.environ.update(environment)
    from streamlit.web.cli import main

    served = ["--server.port", str(port), "--server.address", host, "--server.headless", str(not browser).lower()]
    if is_local(host):
        # Another website may resolve its name to our address (DNS rebinding); the browser then takes both for one site.
        for name in sorted({"localhost", "127.0.0.1", "::1", host}):
            served += ["--server.allowedHosts", name]
    echo(f"The page is at {url_of(host, port)} until Ctrl-C.")
    # The server ends in good order and then sends itself the signal again, which by default kills: files would be left.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    main(["run", str(application()), *served], standalone_mode=False)


def application() -> Path:
    """The page's `ui.py`: beside this package in a clone, inside it in a wheel. FileNotFoundError if in neither."""
    candidates = (_PACKAGE / "ui.py", _PACKAGE.parent / "ui.py")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"the page is missing: {candidates[0]} is not there; install lora-compose again")
