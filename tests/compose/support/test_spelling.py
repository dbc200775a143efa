"""The library's advice on the command line names options, no Python."""

import pytest

from lora_compose.compose.support.spelling import as_options


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("or each has a region, such as Concept(name='cat', region=(0, 0, 0.5, 1))", "--box 0,0,0.5,1"),
        ("Concept(name='cat', region=(left, top, right, bottom)) in pixels", "--box left,top,right,bottom in pixels"),
        ("give it one, Concept(name='cat', class_word='cat')", "give it one, class=cat in --concept"),
        ("Give it: load_concept('a (1).safetensors', 'cat', trigger='sks')", "trigger=sks in --concept"),
        ("a prompt of its own, Concept(name='cat', prompt=...)", "a prompt of its own, prompt=... in --concept"),
        ("or Merge(limit=1), or keep them apart: method='regional'", "or --method merge --set limit=1, or keep"),
        ("keep them apart: method='lora-composer' with a region", "keep them apart: --method lora-composer with"),
        ("switch them off with step_size=0, reinit='off'", "with step_size=0, --set reinit=off"),
        ("leave one out, or use keep_regions=False", "use --set keep_regions=false"),
        ("such as Concept(name='cat', trigger='sks'), and", "such as trigger=sks in --concept, and"),
        ("the words that name it, words={'my cat': [...]}", "name it, --set words='{my cat: [...]}'"),
        ("any_weight=True allows it", "any_weight=true in --concept allows it"),
        ("strength=0.01 leaves none of the 4 steps", "--strength 0.01 leaves none"),
    ],
)
def test_python_becomes_options(message: str, shown: str) -> None:
    assert shown in as_options(message)


def test_what_is_typed_on_the_command_line_stays() -> None:
    typed = "--concept path=cat.safetensors,weight=0.8: unknown field 'wieght'; --set cfg_mask=broadcast is one"
    assert as_options(typed) == typed
