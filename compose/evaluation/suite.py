"""A suite: the concepts, scenes and methods of an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from lora_compose.compose.batch.settings import distinct_seeds
from lora_compose.compose.evaluation.chosen import Chosen, distinct
from lora_compose.compose.evaluation.shipped import find_suite
from lora_compose.compose.files.paths import local_source, moved_start
from lora_compose.compose.files.scenes import read_as
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.savers import Savers
from lora_compose.pipelines.merging import make_merger
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.scene import Concept, Region, Start
from lora_compose.pipelines.scene.strength import Weight, check_sane, read_blocks, read_weight
from lora_compose.pipelines.text.tokens import find_words, own_nouns

SANITY = ("no LoRA", "alone", "merge")
"""Reference rows of every evaluation: no LoRA, each LoRA alone (`method_alone`), and the sum of all."""


Name = Annotated[str, Field(pattern=r"^[\w][\w .,+-]{0,59}$")]


class SuiteConcept(Frozen):
    """A concept with its reference images.

    Attributes:
        lora: Its LoRA, or several by kind ("ordinary", "tara"), of which the first is used where none is named.
        trigger: The rare word or words.
        class_word: The noun after it.
        references: Reference images: a folder, a list of files, `playground:NAME` or `playground-flux:NAME`.
        weight: Factor on the whole LoRA, which may change over the steps (`Concept.weight`).
        blocks: Further factors, by block of the model (`Concept.blocks`).
        any_weight: Whether weights may be beyond 10 and -10.
        negative_prompt: Negative prompt of its region, for methods that read a text per concept.
        role: "style" for a concept that acts everywhere: it has no region, and is not looked for in the image.
    """

    name: Name
    lora: str | Annotated[Mapping[Name, str], Field(min_length=1)]
    trigger: Annotated[str, Field(min_length=1)]
    class_word: Annotated[str, Field(min_length=1)]
    references: str | Annotated[tuple[str, ...], Field(min_length=1)]
    weight: Annotated[Weight, BeforeValidator(read_weight)] = 1.0
    blocks: Annotated[dict[str, float] | None, BeforeValidator(read_blocks)] = None
    any_weight: bool | None = None
    negative_prompt: str | None = None
    role: Literal["subject", "style"] | None = None

    @model_validator(mode="after")
    def _weighs_sanely(self) -> Self:
        if not self.any_weight:
            check_sane(self.weight, self.blocks)
        return self

    @property
    def is_style(self) -> bool:
        """Whether the concept is a style."""
        return self.role == "style"

    @property
    def loras(self) -> Mapping[str, str]:
        """LoRAs by kind; the only one of a concept is of the kind ""."""
        return {"": self.lora} if isinstance(self.lora, str) else self.lora


class SuiteScene(Start):
    """A prompt with concepts, and an optional start image.

    Attributes:
        prompt: Names every concept by its trigger.
        concepts: Names of concepts of the suite.
        bundle: Further concepts, which the prompt does not name. Their LoRAs are merged with those of the scene by
            methods that merge files.
        bystanders: Class words of subjects without a LoRA, by name. The prompt names each by it, where it follows no
            trigger.
        regions: Boxes in pixels by concept or bystander, for methods that take a layout; all of the scene's subjects or
            none.
        negative_prompt: What to avoid.
        width: In pixels; None is the model's own.
        height: In pixels; None is the model's own.
        interaction: How closely the subjects interact: "apart", "touching", or "entangled" (hugging, riding, carrying).
            Tables by kind of scene tell them apart.
    """

    name: Name
    prompt: Annotated[str, Field(min_length=1)]
    concepts: Annotated[tuple[str, ...], Field(min_length=1)]
    bundle: tuple[str, ...] = ()
    bystanders: Mapping[Name, Annotated[str, Field(min_length=1)]] = {}
    regions: Mapping[str, Region] = {}
    negative_prompt: str = ""
    width: Annotated[int, Field(gt=0)] | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    interaction: Literal["apart", "touching", "entangled"] | None = None


class SuiteMethod(Frozen):
    """A method with settings and a kind of LoRAs.

    Attributes:
        name: Its name in tables.
        settings: The settings that differ from the method's defaults.
        lora: The kind of LoRAs it uses; None is each concept's first.
        merge: How the LoRAs of the scene and of its `bundle` are merged into one, a name of `MERGERS`. With the method
            `merge` that acts once, everywhere; with others each subject has it, in its region. None merges no files.
    """

    name: Name
    method: str
    settings: Mapping[str, Any] = {}
    lora: str | None = None
    merge: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """`- merge` is `- {name: merge, method: merge}`, and the name of a method is a name."""
        data = {"method": data} if isinstance(data, str) else data
        return {"name": data["method"], **data} if isinstance(data, dict) and "method" in data else data

    @model_validator(mode="after")
    def _known(self) -> Self:
        make_method(self.method, self.settings)
        if self.merge is not None:
            make_merger(self.merge)
        if self.name in SANITY[:2]:
            raise ValueError(f"{self.name!r} is the name of a row that every evaluation has; choose another one")
        return self


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1), AfterValidator(distinct_seeds)
]


class WindowsConfig(Frozen):
    """Find objects by naming square windows of the image with the suite's encoder.

    Attributes:
        vocabulary: Nouns that a window may be named by besides those of the scene.
        threshold: Least probability of a window that is named right.
    """

    kind: Literal["windows"]
    vocabulary: tuple[str, ...] = ()
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3


class ZeroShotConfig(Frozen):
    """Find objects with a detector that takes words, such as google/owlv2-base-patch16-ensemble.

    Attributes:
        model: A folder or hub repository of a zero-shot object detection model of transformers.
        threshold: Least score.
    """

    kind: Literal["zero-shot"]
    model: str
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.2


class Suite(Frozen):
    """An evaluation.

    Attributes:
        model: A folder, a checkpoint file, a hub repository or `playground`.
        encoder: The encoder for similarity: `playground:judge`, a folder or a hub repository of CLIP, SigLIP or DINOv2.
        detector: How concepts are found in images; None crops the regions of the scenes.
        metrics: Further metrics by name, each with a model of its own: clip-t, clip-i, dino, scr, arcface.
        methods: The methods to compare; `merge` is added if it is missing and no method merges files.
        baseline: The method that the others are compared with.
        seeds: Of the start noise, for every scene and method.
        batch_size: Images made in one call. It is part of the suite because the pixels depend on it.
        threads: CPU threads of a process; the pixels depend on them too. None leaves them.
        processes: How many processes share the work on a CPU, if there are as many processors.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        scheduler: Class name of a diffusers scheduler; None keeps the model's.
        dtype: Precision of the model.
        device: The device; None chooses, and uses every GPU of the machine.
        save_memory: Options that save memory: tiling, model-offload, sequential-offload, gradient-checkpointing.
    """

    name: Name
    model: str
    encoder: str = "openai/clip-vit-base-patch32"
    detector: Annotated[WindowsConfig | ZeroShotConfig, Field(discriminator="kind")] | None = None
    metrics: Annotated[tuple[Chosen, ...], AfterValidator(distinct)] = ()
    concepts: Annotated[tuple[SuiteConcept, ...], Field(min_length=1)]
    scenes: Annotated[tuple[SuiteScene, ...], Field(min_length=1)]
    methods: Annotated[tuple[SuiteMethod, ...], Field(min_length=1)]
    baseline: str = "merge"
    seeds: Seeds
    batch_size: Annotated[int, Field(gt=0, le=64)] = 1
    threads: Annotated[int, Field(gt=0)] | None = None
    processes: Annotated[int, Field(gt=0)] = 1
    steps: Annotated[int, Field(gt=0)] = 25
    guidance_scale: float = 5.0
    scheduler: str | None = None
    dtype: Annotated[str, Field(pattern="^(float32|float16|bfloat16)$")] = "float32"
    device: str | None = None
    save_memory: Savers = ()

    @field_validator("concepts", "scenes", "methods")
    @classmethod
    def _names(cls, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [entry.name for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} stands twice")
        return entries

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = [concept.name for concept in self.concepts]
        for scene in self.scenes:
            _check_scene(scene, known, self)
        for method in self.methods:
            if method.merge is not None:
                _check_merged(method, self.concepts)
            missing = [c.name for c in self.concepts if method.lora is not None and method.lora not in c.loras]
            if missing:
                raise ValueError(
                    f"method {method.name!r} uses LoRAs of the kind {method.lora!r}, which {', '.join(missing)} lacks"
                )
        kind = self.kinds[0]
        if kind and (lacking := [c.name for c in self.concepts if kind not in c.loras]):
            raise ValueError(
                f"{self.concepts[0].name} has a LoRA of the kind {kind!r}, which {', '.join(lacking)} lacks"
            )
        if self.baseline not in (names := [arm.name for arm in self.compared]):
            raise ValueError(f"the baseline {self.baseline!r} is not among the methods; there are {', '.join(names)}")
        return self

    @property
    def compared(self) -> tuple[SuiteMethod, ...]:
        """The methods, `merge` included unless the suite compares merged files."""
        merge = SuiteMethod(name="merge", method="merge")
        there = any(m.name == "merge" or m.merge is not None for m in self.methods)
        return self.methods if there else (merge, *self.methods)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of LoRAs that the methods use; each is tried alone as well. The concepts' own first comes first."""
        first = next(iter(self.concepts[0].loras))
        used = [first if method.lora is None else method.lora for method in self.compared]
        return tuple(dict.fromkeys([first, *used]))

    def concept(self, name: str) -> SuiteConcept:
        """The concept of that name."""
        return next(concept for concept in self.concepts if concept.name == name)

    def scene(self, name: str) -> SuiteScene:
        """The scene of that name."""
        return next(scene for scene in self.scenes if scene.name == name)


def _check_scene(scene: SuiteScene, known: Sequence[str], suite: Suite) -> None:
    where = f"scene {scene.name!r}"
    undefined = [name for name in (*scene.concepts, *scene.bundle) if name not in known]
    if undefined:
        raise ValueError(
            f"{where} names {', '.join(undefined)}, which is not a concept of the suite; there are {', '.join(known)}"
        )
    if len({*scene.concepts, *scene.bundle}) < len(scene.concepts) + len(scene.bundle):
        raise ValueError(f"{where} names a concept twice")
    subjects = [name for name in scene.concepts if not suite.concept(name).is_style]
    if not subjects:
        raise ValueError(f"{where} has no subject; a style is seen in an image of something")
    subjects += _bystanders(scene, known, suite)
    if scene.regions and set(scene.regions) != set(subjects):
        raise ValueError(f"{where} needs a region for each of {', '.join(subjects)}, or none at all")
    if suite.detector is None and not scene.regions:
        raise ValueError(f"{where} has no regions and the suite has no detector, so its concepts cannot be located")
    for name in scene.concepts:
        concept = suite.concept(name)
        if not find_words(concept.trigger, scene.prompt, concept.class_word):
            raise ValueError(f"{where}: the prompt does not name {name!r} by its trigger {concept.trigger!r}")


def _check_merged(method: SuiteMethod, concepts: Sequence[SuiteConcept]) -> None:
    for concept in concepts:
        if concept.blocks or not isinstance(concept.weight, float | int):
            what = "factors by block" if concept.blocks else "a weight that changes over the steps"
            raise ValueError(
                f"method {method.name!r} merges LoRAs into one file, which takes each with one number as its weight, "
                f"and {concept.name!r} has {what}; give it a number, or leave the method out"
            )


def _bystanders(scene: SuiteScene, known: Sequence[str], suite: Suite) -> Sequence[str]:
    """The names of a scene's bystanders. Raises ValueError if one is a concept's, or the prompt does not name it."""
    where = f"scene {scene.name!r}"
    bystanders = [Concept(name=n, role="bystander", class_word=word) for n, word in scene.bystanders.items()]
    if taken := [name for name in scene.bystanders if name in known]:
        raise ValueError(
            f"{where}: the bystander {taken[0]!r} has the name of a concept of the suite; give it another one, such as "
            f"'other {taken[0]}'"
        )
    named = [
        *(Concept(name=c.name, trigger=c.trigger, class_word=c.class_word) for c in map(suite.concept, scene.concepts)),
        *bystanders,
    ]
    for bystander in bystanders:
        if not own_nouns(bystander, scene.prompt, named):
            raise ValueError(
                f"{where}: the prompt does not name the bystander {bystander.name!r}; write {bystander.class_word!r} "
                "where it follows no trigger"
            )
    return [*scene.bystanders]


def read_suite(name: str) -> Suite:
    """Reads and checks a suite, whose paths are relative to it. Raises FileError, which names the field."""
    path = find_suite(name)
    base = path.parent.absolute()
    return moved_suite(read_as(Suite, path), lambda source: local_source(source, base))


def moved_suite(suite: Suite, move: Callable[[str], str]) -> Suite:
    """A suite with every path changed by a function: of LoRAs, models, references and images."""
    moved: dict[str, Any] = {
        "concepts": tuple(_moved_concept(concept, move) for concept in suite.concepts),
        "scenes": tuple(moved_start(scene, move) for scene in suite.scenes),
        "model": move(suite.model),
        "encoder": move(suite.encoder),
    }
    if isinstance(suite.detector, ZeroShotConfig):
        moved["detector"] = suite.detector.model_copy(update={"model": move(suite.detector.model)})
    if suite.metrics:
        moved["metrics"] = tuple(_moved_metric(metric, move) for metric in suite.metrics)
    return suite.model_copy(update=moved)


def _moved_metric(metric: Chosen, move: Callable[[str], str]) -> Chosen:
    faces = metric.faces if metric.faces is None else move(metric.faces)
    return metric.model_copy(update={"model": move(metric.model), "faces": faces})


def _moved_concept(concept: SuiteConcept, move: Callable[[str], str]) -> SuiteConcept:
    def each(sources: Any) -> Any:
        if isinstance(sources, str):
            return move(sources)
        if isinstance(sources, Mapping):
            return {kind: move(source) for kind, source in sources.items()}
        return tuple(map(move, sources))

    return concept.model_copy(update={"lora": each(concept.lora), "references": each(concept.references)})
