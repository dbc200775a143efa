"""The README of a saved model: how to open it, and how to load its concepts, which are not saved with it."""

from collections.abc import Iterable
from pathlib import Path

from lora_compose.pipelines.scene.mask_images import URI_PREFIX
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.sources import moved_files

README = "README.md"


def how_to_open(concepts: Iterable[Concept]) -> str:
    """A README for the folder of a saved model; files of concepts are named without folders."""
    lines = "\n".join(_load(concept) for concept in concepts)
    return f"""# Saved by lora-compose

This folder holds the model. Concepts are not saved with it: they stay in their LoRA files. To compose them again:

```python
from lora_compose import ComposePipeline

pipe = ComposePipeline.from_pretrained("THIS FOLDER")
{lines}
```

`DiffusionPipeline.from_pretrained` of diffusers opens the folder too, as the plain pipeline, without concepts.
"""


def _load(concept: Concept) -> str:
    """The call that loads a concept, with the fields that are not at their defaults."""
    lora = moved_files(concept.lora, lambda source: Path(source).name)
    file = list(lora) if isinstance(lora, tuple) else lora or ""
    given = {name: value for name, value in concept if name != "lora" and value not in (None, _DEFAULTS.get(name))}
    region = concept.region
    if isinstance(region, str) and not region.startswith(URI_PREFIX):
        given["region"] = Path(region).name
    fields = "".join(f", {name}={value!r}" for name, value in given.items())
    return f"pipe.load_concept({file!r}{fields})"


_DEFAULTS = {"weight": 1.0, "role": "subject", "any_weight": False}
"""Values that say nothing, beside None."""
