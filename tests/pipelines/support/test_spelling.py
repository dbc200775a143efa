"""What was probably meant by a name that is not known here."""

import inspect

import pytest

from lora_compose import METHODS, ComposePipeline, Concept
from lora_compose.pipelines.calls.call import refuse_unknown
from lora_compose.pipelines.families import ComposeStableDiffusionPipeline
from lora_compose.pipelines.support.field_errors import FieldError
from lora_compose.pipelines.support.spelling import did_you_mean


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps", "did you mean 'num_inference_steps'?"),
        ("seed", "did you mean 'generator'? generator=torch.Generator().manual_seed(4) is seed 4"),
        ("guidance", "did you mean 'guidance_scale'?"),
        ("loras", "did you mean 'concepts'?"),
        ("size", "did you mean 'width' and 'height'?"),
    ],
)
def test_arguments_of_other_programs_lead_to_diffusers_names(name: str, expected: str) -> None:
    with pytest.raises(TypeError) as error:
        refuse_unknown([name], ComposeStableDiffusionPipeline.__call__)
    assert str(error.value) == f"unknown argument {name!r}; {expected}"


def test_fields_of_other_programs_lead_to_those_of_a_concept() -> None:
    with pytest.raises(FieldError, match=r"box: unknown field; fields are name, .*; did you mean 'region'\?"):
        Concept(name="cat", box=(0, 0, 1, 1))  # pyright: ignore[reportCallIssue]
    assert did_you_mean("class_word", ("path", "class", "trigger")) == "; did you mean 'class'?"
    assert did_you_mean("steps", ("timesteps",)) == "; did you mean 'timesteps'?", "only names that are there"


def test_a_concept_without_field_names_says_how_it_is_written() -> None:
    with pytest.raises(TypeError, match=r"^the fields of a Concept are given by name: name='cat'$"):
        Concept("cat")  # pyright: ignore[reportCallIssue]


def test_the_help_of_a_call_names_every_method_and_shows_a_box() -> None:
    text = " ".join((inspect.getdoc(ComposePipeline.__call__) or "").split())
    methods = text.partition("method: ")[2].partition(" or settings")[0]
    assert set(methods.rstrip(",").split(", ")) == set(METHODS)
    assert '{"cat": (0, 0, 64, 128)}' in text
