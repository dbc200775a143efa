"""How the images of a batch are made: one model and one method for all of its scenes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from lora_compose.compose.support.frozen import Frozen, shared
from lora_compose.compose.support.savers import Savers
from lora_compose.pipelines.scene.scene import Run, Scene

LAST_SEED = 2**63 - 1
MOST_SEEDS = 10_000
"""Of one scene."""

_SPAN = re.compile(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?")


def parse_seeds(value: Any) -> Any:
    """Reads seeds: 3, "0-7", "1, 4, 9", or lists of these; anything else stays. ValueError for unusable spans."""
    if isinstance(value, bool) or not isinstance(value, int | str | Sequence):
        return value
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    seeds: list[Any] = []
    for part in parts:
        seeds += _span(part, MOST_SEEDS - len(seeds)) if isinstance(part, str) else [part]
    return tuple(seeds)


def _span(text: str, most: int) -> range:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no seed; expected a number, or a span such as 0-7")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ValueError(f"the seeds {text.strip()} run backwards")
    if last - first >= most:
        raise ValueError(f"{text.strip()} are too many seeds; a scene has at most {MOST_SEEDS}")
    return range(first, last + 1)


def distinct_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Raises ValueError if a seed is given twice."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the seeds must differ; {Counter(seeds).most_common(1)[0][0]} stands twice")
    return seeds


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=LAST_SEED)], ...],
    Field(min_length=1, max_length=MOST_SEEDS),
    BeforeValidator(parse_seeds),
    AfterValidator(distinct_seeds),
]
"""Seeds, each once; read as `parse_seeds` does."""


class BatchSettings(Frozen):
    """How the images of a batch are made.

    Steps, guidance and precision that are not given are the model's and the device's (`run_batch`).

    Attributes:
        model: A folder, a checkpoint file, a hub repository or `playground`.
        method: Name of the method; None chooses for each scene.
        settings: The method's settings that differ from its defaults.
        scheduler: Class name of a diffusers scheduler; None keeps the model's.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        seeds: Seeds of scenes without their own.
        batch_size: Images of one scene that are made in one call; the pixels depend on it.
        threads: CPU threads of a process; the pixels depend on them, too. None leaves them to torch.
        dtype: Precision of the model.
        quantize: nf4, int8, fp8, or a file of the denoiser in fewer bits; None is the model as it is.
        device: The device; None chooses, and uses every GPU of the machine.
        save_memory: Options that save memory.
    """

    model: str
    method: str | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)
    scheduler: str | None = None
    steps: Annotated[int, Field(gt=0)] = 25
    guidance_scale: float = 5.0
    seeds: Seeds = (0,)
    batch_size: Annotated[int, Field(gt=0, le=64)] = 1
    threads: Annotated[int, Field(gt=0)] | None = None
    dtype: Annotated[str, Field(pattern="^(float32|float16|bfloat16)$")] = "float32"
    quantize: str | None = None
    device: str | None = None
    save_memory: Savers = ()

    @property
    def bare_run(self) -> Run:
        """A run that opens the model; its scene has nothing in it."""
        return self.run(Scene(prompt="-"))

    def run(self, scene: Scene) -> Run:
        """The run of a scene."""
        return Run(scene=scene, **shared(Run.model_fields.keys() - {"scene", "seed"}, self))
