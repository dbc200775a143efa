"""Packages that only some commands need, checked before slow imports."""

import importlib.util

EVALUATION = ("scipy", "pandas", "matplotlib")
"""What evaluations need, and everything that reads their folders."""
SERVE = ("fastapi", "uvicorn")


def check_packages(what: str, names: tuple[str, ...], extra: str) -> None:
    """Raises ValueError if packages are missing that `what` needs, and names the extra that installs them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install 'lora-compose[{extra}]'")
