"""Writes the descriptions of public names into `docs/reference.md`: `python docs/reference_page.py`.

A description stands between `<!-- NAME -->` and `<!-- end -->`, as Markdown that code hosts show: the signature as the
source has it, and the docstring.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import lora_compose

PAGE = Path(__file__).with_name("reference.md")
PIPELINE = (
    "from_pretrained", "from_single_file", "from_pipe", "save_pretrained", "load_concept", "add_concepts",
    "unload_concept", "concepts", "concept_memory", "bank_memory", "__call__", "plan",
)  # fmt: skip
"""What our pipelines have beside diffusers' own."""
_BLOCK = re.compile(r"^<!-- (\w+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Warns|Note):(?: (.*))?$")
_TITLES = {"Args": "Arguments"}


def written(text: str) -> str:
    """The page with every description anew."""
    return _BLOCK.sub(lambda found: f"<!-- {found[1]} -->\n{description(found[1])}\n<!-- end -->", text)


def description(name: str) -> str:
    """A public name: heading, signature, docstring, and its public members."""
    it = getattr(lora_compose, name)
    parts = [f"### `{name}`", _code(_signature(it)), _docstring(it)]
    if inspect.isclass(it):
        for member, function in _members(it):
            parts += [f"#### `{name}.{member}`", _code(_signature(function)), _docstring(function)]
    return "\n\n".join(part for part in parts if part)


def _members(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties that are described, in the order of the source, inherited ones of ours first."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("lora_compose")]
    names = [name for base in ours for name in vars(base)]
    wanted = PIPELINE if cls is lora_compose.ComposePipeline else [name for name in names if not name.startswith("_")]
    found = []
    for name in dict.fromkeys(wanted):
        value = inspect.getattr_static(cls, name, None)
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and function.__doc__ and function.__module__.startswith("lora_compose"):
            found.append((name, function))
    return found


def _signature(it: Any) -> str:
    """The signature of a function, or the fields of a class, as the source has them."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(it))).body
    if isinstance(node, ast.ClassDef) and it is lora_compose.ComposePipeline:
        return ""
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign) and not _private(one.target)]
        return "\n".join(fields)
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = [one for one in _parameters(node.args) if one.partition(":")[0] not in ("self", "cls")]
    line = f"{node.name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{node.name}(", *(f"    {one}," for one in parameters), f"){returns}"])


def _private(target: ast.expr) -> bool:
    return ast.unparse(target).startswith("_") or ast.unparse(target) == "model_config"


def _parameters(arguments: ast.arguments) -> list[str]:
    """Parameters with annotations and defaults, and the signs between them."""
    text = ast.unparse(ast.FunctionDef(name="f", args=arguments, body=[ast.Pass()], decorator_list=[], lineno=0))
    inside, depth, found = text[len("def f(") : text.rindex("):")], 0, [""]
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found if one.strip()]


def _code(text: str) -> str:
    return f"```text\n{text}\n```" if text else ""


def _docstring(it: Any) -> str:
    """A docstring in Google's style as Markdown: sections become lists."""
    found, section = [], None
    for line in inspect.cleandoc(it.__doc__ or "").splitlines():
        if heading := _SECTION.match(line):
            section = heading[1]
            found += [f"**{_TITLES.get(section, section)}**{': ' + heading[2] if heading[2] else ''}", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, text = line.strip().partition(": ")
            named = bool(colon) and re.fullmatch(r"[\w*, `.\[\]]+", name) is not None
            found.append(f"- `{name}`: {text}" if named else line.strip())
        elif section and line.startswith("     "):
            found.append(f"  {line.strip()}")
        else:
            section = section if not line else None
            found.append(line)
    return "\n".join(found).strip()


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
