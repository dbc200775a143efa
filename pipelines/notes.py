"""Warnings about a call that is no mistake."""

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Logs a warning the first time it comes up in this process."""
    logger.warning(message)
