"""Warnings about calls that are allowed but may surprise."""

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Logs a warning once per process."""
    logger.warning(message)
