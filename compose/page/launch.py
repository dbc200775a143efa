"""`lora-compose ui`: starts the page."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from lora_compose.compose.support.network import is_local
from lora_compose.compose.support.terminal import echo

_PACKAGE = Path(__file__).resolve().parents[1]
_OUT, _LORAS, _LOCAL = "LORA_COMPOSE_OUT", "LORA_COMPOSE_LORAS", "LORA_COMPOSE_LOCAL"


@dataclass(frozen=True)
class Options:
    """How the page was started; passed in environment variables, since Streamlit runs the script anew for each session.

    Attributes:
        out: The folder for images and evaluations.
        loras: A folder whose LoRAs can be chosen; None if none was named.
        local: Whether only this machine can open the page; files may then be named by path.
    """

    out: Path = Path("outputs")
    loras: Path | None = None
    local: bool = False

    @property
    def images(self) -> Path:
        """The folder for saved images."""
        return self.out / "page"

    @property
    def evaluations(self) -> Path:
        """The folder of evaluations, as the command line has it."""
        return self.out / "evaluation"


def options() -> Options:
    """How this page was started."""
    loras = os.environ.get(_LORAS)
    return Options(
        Path(os.environ.get(_OUT, "outputs")), Path(loras) if loras else None, os.environ.get(_LOCAL) == "yes"
    )


def start(port: int, host: str, out: Path, loras: Path | None, browser: bool) -> None:
    """Starts the page in this process, until a signal ends it.

    Args:
        port: The port to listen on.
        host: The address to listen on.
        out: The folder for images and evaluations.
        loras: A folder whose LoRAs the page offers.
        browser: Whether a browser is opened.

    Raises:
        ValueError: If Streamlit or the folder is missing.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ValueError("the page needs one more package: pip install 'lora-compose[ui]'")
    if loras is not None and not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}; --loras names a folder with safetensors files")
    environment = {_OUT: str(out.absolute()), _LOCAL: "yes" if is_local(host) else "no"}
    environment |= {_LORAS: str(loras.absolute())} if loras is not None else {}
    os.environ.update(environment)
    from streamlit.web.cli import main

    served = ["--server.port", str(port), "--server.address", host, "--server.headless", str(not browser).lower()]
    if is_local(host):
        # Another website may resolve its name to our address (DNS rebinding); the browser then takes both for one site.
        for name in sorted({"localhost", "127.0.0.1", "::1", host}):
            served += ["--server.allowedHosts", name]
    echo(f"The page is at http://{host}:{port} until Ctrl-C.")
    # In this process: a signal that ends the command then ends the page.
    main(["run", str(script()), *served], standalone_mode=False)


def script() -> Path:
    """The page's script: beside this package in a clone, inside it in an installed wheel.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    candidates = (_PACKAGE / "ui.py", _PACKAGE.parent / "ui.py")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"the page is missing: {candidates[0]} is not there; install lora-compose again")
