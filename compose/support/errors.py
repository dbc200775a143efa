"""The messages of errors of any kind, as they are stored and shown."""

MOST = 1000
"""Characters of a message; libraries print whole tensors."""


def error_text(error: BaseException) -> str:
    """The message of an error, with its notes; except for ours, with the name of its type."""
    text = str(error).strip()[:MOST]
    message = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
    return "\n".join([message, *getattr(error, "__notes__", ())])
