"""Checks early whether the model hub can be reached, with advice if not."""

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds until a hub that does not answer counts as out of reach."""


def is_hub_name(source: str) -> bool:
    """Whether a name can only be a hub repository: "owner/name", and no folder of that name exists."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def reachable(repository: str, *files: str, **options: Any) -> dict[str, Any]:
    """The options for reading a repository; if the hub is out of reach, those that read the cache only.

    `huggingface_hub` asks six times for each file, for half a minute, before it looks into its cache or gives up.

    Args:
        repository: "owner/name".
        files: Every copy of it has one of these.
        options: Those of `huggingface_hub` that the user has given.

    Raises:
        ConnectionError: If the hub is out of reach, and the cache has no copy.
    """
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return options
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the type depends on huggingface_hub's HTTP library
        where = {name: options[name] for name in ("cache_dir", "revision") if options.get(name) is not None}
        if any(isinstance(try_to_load_from_cache(repository, file, **where), str) for file in files):
            logger.warning("the model hub is out of reach (%s): %s is read from the cache", error, repository)
            return {**options, "local_files_only": True}
        raise ConnectionError(
            f"the model hub {constants.ENDPOINT} is out of reach ({error}), and there is no copy of {repository!r} in "
            f"the cache {where.get('cache_dir', constants.HF_HUB_CACHE)}. Give a folder or a file instead of a "
            "repository, or connect to the network; HF_HUB_OFFLINE=1 reads the cache alone"
        ) from error
    return options
