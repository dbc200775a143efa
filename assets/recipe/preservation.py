"""A suite that compares LoRAs trained with each kind of prior preservation, from a suite of the same concepts.

export PYTHONPATH=assets
for how in none images captions; do
  python -m recipe.loras references prior trained/$how --model MODEL --kind ordinary --preserve $how
done
python -m recipe.preservation assets/suites/playground-quick.yaml trained preservation.yaml --model MODEL
lora-compose evaluate preservation.yaml --out outputs/evaluation/preservation
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.loras import Preserve

METHODS = ("merge", "regional", "draft")


def compared(suite: Mapping[str, Any], trained: Path, model: str | None) -> dict[str, Any]:
    """The suite with a LoRA of each kind for every concept, and each method with each kind."""
    kinds = [kind.value for kind in Preserve]
    concepts = [
        {
            **concept,
            "lora": {kind: str((trained / kind / f"{concept['name']}.safetensors").resolve()) for kind in kinds},
        }
        for concept in suite["concepts"]
    ]
    methods = [{"name": f"{method}, {kind}", "method": method, "lora": kind} for method in METHODS for kind in kinds]
    changed = {"name": "preservation", "concepts": concepts, "methods": methods, "baseline": f"merge, {kinds[0]}"}
    return {**suite, **changed, "model": model or suite["model"]}


@handle_errors()
def main(
    suite: Path,
    trained: Annotated[Path, typer.Argument(help="Has a folder of LoRAs for each kind.")],
    out: Annotated[Path, typer.Argument(help="The suite to write.")],
    model: Annotated[str | None, typer.Option(help="The model that the LoRAs are for, if not the suite's.")] = None,
) -> None:
    """Writes the suite."""
    text = yaml.safe_dump(compared(yaml.safe_load(suite.read_text("utf-8")), trained, model), sort_keys=False)
    out.write_text(text, "utf-8")
    echo(out)


if __name__ == "__main__":
    typer.run(main)
