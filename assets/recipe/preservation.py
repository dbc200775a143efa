"""A suite that compares LoRAs trained with each kind of prior preservation, from a suite of the same concepts.

export PYTHONPATH=assets
for how in none images captions; do
  python -m recipe.loras references prior trained/$how --model MODEL --kind ordinary --preserve $how \
    --concept cat --concept dog --concept mira
done
python -m recipe.preservation assets/suites/playground-full.yaml trained preservation.yaml --model MODEL
# of the transformer: --preset playground-flux for the former, assets/suites/playground-flux.yaml for the latter
# a further kind where guidance has unconditional rows: empty
lora-compose evaluate preservation.yaml --out outputs/evaluation/preservation

Every pair of the concepts that were trained stands in each of four places, and each concept beside a plain subject of
its class in two of them.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.loras import Preserve
from recipe.suites import HALVES, Place
from recipe.world import CHARACTERS, article

METHODS = ("merge", "draft", "regional")
GROUNDS = ("on grass", "in snow", "in a room", "on a white background")


def compared(suite: Mapping[str, Any], trained: Path, model: str | None) -> dict[str, Any]:
    """The suite with the concepts of which there is a LoRA of each kind, in pairs, and each method with each kind.

    Kinds are those of the folders in `trained`.

    Raises:
        ValueError: If there are not two such concepts.
    """
    kinds = [kind.value for kind in Preserve if (trained / kind).is_dir()] or [kind.value for kind in Preserve]
    concepts: list[dict[str, Any]] = []
    for concept in suite["concepts"]:
        files = {kind: (trained / kind / f"{concept['name']}.safetensors").resolve() for kind in kinds}
        if all(file.is_file() for file in files.values()):
            concepts.append({**concept, "lora": {kind: str(file) for kind, file in files.items()}})
    if len(concepts) < 2:
        raise ValueError(f"{trained} needs LoRAs of at least two concepts, each in the folders {', '.join(kinds)}")
    names = [concept["name"] for concept in concepts]
    methods = [
        {"name": f"{method}, {kind}", "method": method, "lora": kind,
         "settings": {"keep_regions": False} if method == "draft" else {}}
        for method in METHODS for kind in kinds
    ]  # fmt: skip
    scenes = [*_pairs(names), *(_beside_its_class(name, ground) for name in names for ground in GROUNDS[:2])]
    changed = {"concepts": concepts, "scenes": scenes, "methods": methods}
    return {**suite, **changed, "baseline": f"draft, {kinds[0]}", "model": model or suite["model"]}


def _pairs(names: Sequence[str]) -> list[dict[str, Any]]:
    lines = [
        line for pair in combinations(names, 2) for ground in GROUNDS for line in Place(pair, ground, HALVES).lines()
    ]
    return yaml.safe_load("\n".join(lines))


def _beside_its_class(name: str, ground: str) -> dict[str, Any]:
    """A concept on the left of a plain subject of its class."""
    character = CHARACTERS[name]
    plain = f"plain {character.class_word}"
    return {
        "name": f"{name} and {plain} {ground}", "concepts": [name], "bystanders": {plain: character.class_word},
        "prompt": f"{article(character.phrase)} and {article(character.class_word)} {ground}",
        "regions": {name: [*HALVES[0]], plain: [*HALVES[1]]},
    }  # fmt: skip


@handle_errors()
def main(
    suite: Path,
    trained: Annotated[Path, typer.Argument(help="Has folders of LoRAs by kind: images, captions, empty, none.")],
    out: Annotated[Path, typer.Argument(help="The suite to write.")],
    model: Annotated[str | None, typer.Option(help="The model that the LoRAs are for, if not the suite's.")] = None,
) -> None:
    """Writes the suite."""
    made = compared(yaml.safe_load(suite.read_text("utf-8")), trained, model) | {"name": out.stem}
    text = yaml.safe_dump(made, sort_keys=False)
    out.write_text(text, "utf-8")
    echo(out)


if __name__ == "__main__":
    typer.run(main)
