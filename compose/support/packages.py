"""Packages that only some commands need, checked before slow imports."""

import importlib.util

EVALUATION = ("scipy", "pandas", "matplotlib")
"""What evaluations need, and everything that reads their folders."""
SERVE = ("fastapi", "uvicorn")


def check_packages(what: str, names: tuple[str, ...], extra: str) -> None:
    """Raises ValueError if packages are not installed.

    Args:
        what: The beginning of the message: what needs them.
        extra: The extra of lora-compose that installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install 'lora-compose[{extra}]'")
