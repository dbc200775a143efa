"""What a request leaves open: the concepts of "auto", and the method, by the rule of a call in Python."""

from collections.abc import Sequence
from typing import Any

from lora_compose.compose.generate.early import Header, told_by
from lora_compose.compose.serve.requests import AUTO, MOST_CONCEPTS, ImageRequest, RequestedConcept
from lora_compose.pipelines.calls.resolved_call import resolve_choice
from lora_compose.pipelines.formats.files import LoraError
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.methods import ASKED_FOR, name_of
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.notes import kept
from lora_compose.pipelines.text.selection import choose_concepts


def chosen_concepts(request: ImageRequest) -> Sequence[RequestedConcept]:
    """The concepts of a request that has been chosen for."""
    return request.concepts if isinstance(request.concepts, tuple) else ()


def chosen(pipe: Any, request: ImageRequest) -> tuple[ImageRequest, str | None]:
    """A resolved request with its concepts and method, and why it is this one; None without concepts.

    It depends on the request alone, not on those of its batch, and on the headers of files alone: a plan of the call
    would read their weights, and this must not wait for the model. Raises ValueError if it names a LoRA that is not
    there, or the prompt names none or too many for "auto".
    """
    if request.concepts == AUTO:
        named = choose_concepts(request.prompt, pipe.concepts)
        if len(named.names) > MOST_CONCEPTS:
            raise ValueError(f"the prompt names {len(named.names)} concepts; at most {MOST_CONCEPTS}")
        concepts = tuple(RequestedConcept(name=name) for name in named.names)
        request = request.model_copy(update={"prompt": named.prompt, "concepts": concepts})
    headers = [_header(pipe, i, concept) for i, concept in enumerate(chosen_concepts(request))]
    if not headers:
        return request, None
    if request.method is not None:
        return request, ASKED_FOR
    with kept():  # the reason goes into the answer
        choice = resolve_choice(None, headers, [request.prompt])
    return request.model_copy(update={"method": name_of(choice.method)[0]}), choice.reason


def _header(pipe: Any, index: int, asked: RequestedConcept) -> Header:
    if asked.concept.is_bystander:
        return Header(asked.concept, None, Words())
    known = pipe.concepts.get(asked.name)
    if known is None:
        raise ValueError(f"concepts[{index}]: there is no LoRA of this name; GET /loras lists those that there are")
    files = files_of(known.lora)
    trained, words = _in_file(files[0]) if files else (None, Words())
    return Header(asked.concept.completed(known), trained if len(files) == 1 else None, words)


def _in_file(source: str) -> tuple[str | None, Words]:
    path = expanded(source)
    try:
        return told_by(path)
    except (LoraError, OSError):  # the call that needs the file says so
        return None, Words()
