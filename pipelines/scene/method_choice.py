"""The method of a call that names none: one rule for our pipelines and for other programs."""

from collections.abc import Sequence
from typing import Literal

Name = Literal["draft", "regional", "tara", "merge"]


def method_for(
    subjects: Sequence[tuple[str, bool]],
    *,
    styles: bool,
    several: bool,
    lacks: str,
    trained: bool,
) -> tuple[Name, str]:
    """The name of the method, and the reason for it.

    Args:
        subjects: The name of each subject, and whether it has a region.
        styles: Whether there are concepts beside them.
        several: Whether a prompt has several subjects.
        lacks: What Draft lacks to find the subjects of each prompt by their words; empty if nothing.
        trained: Whether the LoRAs that decide were trained with token masks (TARA).
    """
    boxed = ", ".join(name for name, has_region in subjects if has_region)
    others = ", ".join(name for name, has_region in subjects if not has_region)
    if boxed:
        reason = f"{boxed} has a region" if others else f"every {'subject' if styles else 'concept'} has a region"
        if not several:
            return "regional", f"{reason}, and there is one subject"
        if lacks:
            return "regional", f"{reason}, and {lacks}"
        if others:
            return "draft", f"{reason}, and {others} is looked for in the rest of the image"
        return "draft", f"{reason}, and the prompt names each by trigger and class word"
    if several and not lacks:
        return "draft", "the prompt names every concept by trigger and class word"
    if trained:
        return "tara", "every concept was trained for it" + (f", and {lacks}" if several else "")
    if several:
        return "merge", lacks
    if len(subjects) > 1:
        return "merge", "no prompt has several subjects"
    return "merge", "there is one subject" if subjects else "styles act everywhere"
