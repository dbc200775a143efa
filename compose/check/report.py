"""Checks a run without denoising: matched words and layers, costs, and all problems."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_compose.attention import backbone_of
from lora_compose.compose.benchmark.counting import Counted, count_run
from lora_compose.compose.benchmark.running import needs_running
from lora_compose.compose.files.atomic import check_writable
from lora_compose.compose.generate.defaults import complete
from lora_compose.compose.generate.early import attempt, early_problems
from lora_compose.compose.generate.images import named_in
from lora_compose.compose.generate.making import load, method_of, plan, size_of, steps_of
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.schedulers import scheduler_of
from lora_compose.compose.playground.assets import lora_source
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.calls.call_plan import CallPlan, PlannedConcept
from lora_compose.pipelines.calls.memory import check_size
from lora_compose.pipelines.calls.resolved_call import resolve_choice
from lora_compose.pipelines.concepts.concept_set import LoadedConcept, check_blocks
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.concepts.merged import DEFAULT
from lora_compose.pipelines.methods import Choice, Settings, name_of
from lora_compose.pipelines.scene.mask_images import mask_name
from lora_compose.pipelines.scene.regions import check_region
from lora_compose.pipelines.scene.scene import Concept, Run
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.scene.strength import WeightSchedule, blocks_text, weight_text
from lora_compose.pipelines.support.notes import kept, warn
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.long_prompts import LongTokenizer, chunks_of
from lora_compose.pipelines.text.templates import TemplateTokenizer
from lora_compose.pipelines.text.textual_inversion import ExpandingTokenizer
from lora_compose.pipelines.text.tokens import Positions, check_disjoint, find_trigger, locate, special_tokens

_KNOWN_COSTS = 500
"""Most costs that are kept for later checks."""


@dataclass(frozen=True)
class RunCost:
    """The cost of an image in FLOPs.

    Attributes:
        flops: FLOPs; a multiplication and an addition count as two.
        plain_flops: FLOPs of the same image without concepts.
    """

    rows: str
    flops: int
    plain_flops: int


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        facts: Label and text, in the order to be shown.
        problems: Errors that would make the run fail; empty if it can run.
        cost: Cost of an image; None if it is known in rows alone, or not at all.
        choice: The method, and the reason for the choice; None without concepts.
    """

    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    cost: RunCost | None = None
    choice: Choice | None = None


def check(
    run: Run,
    pipe: Any = None,
    *,
    loras: Path | None = None,
    variant: str | None = None,
    savers: Collection[Saver] = (),
    out: Path | None = None,
    known_costs: dict[str, Counted] | None = None,
) -> Report:
    """Checks everything that a run needs, and collects all problems, not only the first.

    What can be judged without the model is judged first, and the model is not opened if something of that is wrong.

    Args:
        pipe: The run's model, if it is open already; then the run is complete.
        loras: A folder of LoRAs; those that the prompt names take part. None means the concepts of the scene.
        variant: As for `open_model`.
        savers: As for `open_model`.
        out: Where the run would write its images; None is not looked at.
        known_costs: Costs that earlier checks of this pipeline have counted, a few hundred; this check adds its own.
    """
    problems: list[str] = []
    facts: list[tuple[str, str]] = []
    completed = attempt(problems, complete, run) if pipe is None else None
    if completed is not None:
        run, told = completed
        facts = [("defaults", told.removeprefix("by default "))] if told else []
    opened = (run.model, run.dtype, *(() if run.quantize is None else (run.quantize,)))
    facts = [("model", ", ".join(opened)), *facts, ("prompt", run.scene.prompt)]
    cost: RunCost | None = None
    choice: Choice | None = None
    with kept() as notes:
        if out is not None:
            attempt(problems, check_writable, out / "0.png")
        if loras is not None and (scene := attempt(problems, named_in, run.scene, loras)) is not None:
            run = run.model_copy(update={"scene": scene})
        if completed is not None:
            problems += early_problems(run, facts_of(run.model))
        if pipe is None and not problems:
            pipe = attempt(problems, open_model, run, savers, variant)
        if pipe is None:
            for concept in run.scene.concepts:
                facts += attempt(problems, _file_facts, concept) or []
            warn("the model was not opened: mend the problems, and check again for what only it can tell")
        else:
            known_costs = {} if known_costs is None else known_costs
            of_model, cost, choice = _facts(pipe, run, problems, known_costs)
            facts += of_model
    return Report(tuple(facts), tuple(notes), tuple(dict.fromkeys(problems)), cost, choice)


def _facts(
    pipe: Any, run: Run, problems: list[str], known_costs: dict[str, Counted]
) -> tuple[list[tuple[str, str]], RunCost | None, Choice | None]:
    all_loaded = [attempt(problems, load, pipe, concept) for concept in run.scene.concepts]
    prompt = attempt(problems, plain_text, run.scene.prompt) or run.scene.prompt
    of_model = run.scene.model_copy(update={"image": None, "references": ()})
    width, height = attempt(problems, size_of, pipe, run.scene) or size_of(pipe, of_model)
    attempt(problems, pipe.check_sides, width, height)
    attempt(problems, check_size, backbone_of(pipe.model), pipe.vae_scale_factor, pipe.runs_on, width, height)
    method = attempt(problems, method_of, run)
    concepts, of_concepts = [], []
    for asked, loaded in zip(run.scene.concepts, all_loaded, strict=True):
        of_concepts.append(attempt(problems, _file_facts, asked) or [] if loaded is None else _concept_facts(loaded))
        concepts.append(concept := asked if loaded is None else loaded.concept)
        if run.scene.image is None:  # otherwise regions are in the coordinates of the image, which the plan checks
            attempt(problems, check_region, concept, width, height)
        if loaded is not None:
            attempt(problems, check_blocks, loaded, pipe.model)
    planned = None if problems else attempt(problems, plan, pipe, run)
    for warning in () if planned is None else planned.warnings:
        warn(warning)
    choice = None if planned is None else planned.choice
    if planned is None and run.scene.concepts and all(all_loaded) and (method is None) == (run.method is None):
        choice = attempt(problems, resolve_choice, method, all_loaded, [run.scene.prompt])
    if planned is None:
        tokenizer = _tokenizer(pipe, all_loaded, prompt, problems)
        places = _located(tokenizer, prompt, concepts, problems)
    else:
        tokenizer, places = planned.resolved.tokenizers[0], list(map(_place, planned.concepts))
    facts = [("tokens", _tokens(tokenizer, prompt))]
    for concept, of_concept, place in zip(concepts, of_concepts, places, strict=True):
        facts += [*of_concept, (f"{concept.name}: words", _words(concept, place))]
    cost = None
    if not problems and not needs_running(pipe):
        cost = attempt(problems, _cost, pipe, run, planned, all_loaded, known_costs)
    facts += [
        ("method", _method_words(run, choice)),
        ("size", f"{width} x {height} pixels"),
        *((name, str(value)) for name, value in run.scene.start.items()),
        *(("reference", path) for path in run.scene.references),
        *(("control", f"{control.model}, {control.image}, scale {control.scale:g}") for control in run.scene.controls),
        *(("IP-Adapter", f"{a.model}, {a.image}, scale {a.scale:g}") for a in run.scene.ip_adapters),
        ("cost", _cost_words(pipe, run, planned, cost)),
    ]
    return facts, cost, choice


def _tokenizer(pipe: Any, concepts: Sequence[LoadedConcept | None], prompt: str, problems: list[str]) -> Any:
    """The tokenizer of a prompt in a run without a plan, whose concepts may not all have been loaded."""
    loaded = [concept for concept in concepts if concept is not None]
    tokenizer = (attempt(problems, pipe.tokenizers_for, loaded) or pipe.tokenizers_for([]))[0]
    if not (concepts and pipe.reads_in_chunks):
        return tokenizer
    chunks = attempt(problems, chunks_of, tokenizer, prompt) or [(0, len(prompt))]
    return LongTokenizer(tokenizer, len(chunks)) if len(chunks) > 1 else tokenizer


def _located(tokenizer: Any, prompt: str, concepts: Sequence[Concept], problems: list[str]) -> list[Positions | None]:
    """Words of the concepts in the prompt of a run without a plan, which may have several problems with them."""
    here = [concept for concept in concepts if concept.trigger and _is_named(concept, prompt)]
    places = {concept.name: attempt(problems, locate, tokenizer, prompt, concept, concepts) for concept in here}
    named = [concept for concept in here if places[concept.name]]
    attempt(problems, check_disjoint, named, [places[concept.name] for concept in named], prompt)
    return [places.get(concept.name) for concept in concepts]


def _is_named(concept: Concept, prompt: str) -> bool:
    """Whether the prompt has, or has to have, the trigger of a concept."""
    return concept.prompt is None or bool(find_trigger(concept, prompt))


def _place(planned: PlannedConcept) -> Positions | None:
    """The words of a planned concept in the only prompt."""
    if (trigger := planned.trigger.get(0)) is None:
        return None
    return Positions(trigger, tuple(token for token in planned.phrase[0] if token not in trigger))


def _file_facts(concept: Concept) -> list[tuple[str, str]]:
    files = [(source, read_lora(find_file(lora_source(source)))) for source in files_of(concept.lora)]
    return [(f"{concept.name}: file", f"{source}, SHA-256 {file.sha256}") for source, file in files]


def _concept_facts(loaded: LoadedConcept) -> list[tuple[str, str]]:
    concept, factors = loaded.concept, loaded.factors
    trained = f", trained with {loaded.trained_with}" if loaded.trained_with else ""
    facts = [
        *[(f"{concept.name}: file", f"{file.path}, SHA-256 {file.sha256}{trained}") for file in loaded.files],
        *([] if loaded.files else [(f"{concept.name}: file", "none" if concept.is_bystander else "a loaded adapter")]),
        *([(f"{concept.name}: merged", f"{concept.merge or DEFAULT}, in this order")] if len(loaded.files) > 1 else []),
        (f"{concept.name}: layers", "none" if concept.is_bystander else factors.report.partition(";")[0]),
    ]
    if factors.unmatched:
        facts.append((f"{concept.name}: left out", f"{len(factors.unmatched)} keys: {', '.join(factors.unmatched)}"))
    if concept.region is not None:
        facts.append((f"{concept.name}: region", _region(concept.region)))
    if concept.is_style:
        facts.append((f"{concept.name}: role", "style, everywhere"))
    if concept.is_bystander:
        facts.append((f"{concept.name}: role", "bystander, without a LoRA"))
    if concept.references:
        facts.append((f"{concept.name}: references", "acts on reference images, too"))
    facts.append((f"{concept.name}: weight", weight_text(concept.weight)))
    return [*facts, (f"{concept.name}: blocks", blocks_text(concept.blocks))] if concept.blocks else facts


def _region(region: tuple[float, float, float, float] | str) -> str:
    if isinstance(region, str):
        return f"mask {mask_name(region)}"
    left, top, right, bottom = region
    return f"{left} to {right} across, {top} to {bottom} down"


def _words(concept: Concept, place: Positions | None) -> str:
    if concept.is_bystander:
        return f"looked for by its class word {concept.class_word!r}"
    if not concept.trigger:
        return "no trigger given, so " + ("it acts on all" if concept.is_style else "no token belongs to it")
    if place is None:
        where = "was not found" if concept.prompt is None else "is not in the prompt; the concept has one of its own"
        return f"the trigger {concept.trigger!r} {where}"
    words = f"trigger {concept.trigger!r} at token {_listed(place.trigger)}"
    if not concept.class_word:
        return f"{words}; no class word given"
    if not place.class_word:
        return f"{words}; the class word {concept.class_word!r} does not follow it"
    return f"{words}; class word {concept.class_word!r} at token {_listed(place.class_word)}"


def _listed(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions))


def _tokens(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model reads it, with positions; a start token is counted, in each chunk."""
    if isinstance(tokenizer, LongTokenizer):
        inner = tokenizer.tokenizer
        texts = [prompt[slice(*span)] for span in chunks_of(inner, prompt)]
        parts = [_tokens_from(inner, text, i * inner.model_max_length) for i, text in enumerate(texts)]
        return f"{' | '.join(parts)} (in {len(parts)} chunks)" if len(parts) > 1 else parts[0]
    return _tokens_from(tokenizer, prompt, 0)


def _tokens_from(tokenizer: ExpandingTokenizer | TemplateTokenizer, prompt: str, first: int) -> str:
    in_template = isinstance(tokenizer, TemplateTokenizer)
    front, back = (tokenizer.positions(prompt, 0, 1)[0], 0) if in_template else special_tokens(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length - front - back
    words = [piece.removesuffix("</w>").lstrip("▁Ġ") for piece in tokenizer.tokenizer.convert_ids_to_tokens(ids)]
    text = " ".join(f"{position}:{word}" for position, word in enumerate(words[:limit], start=first + front))
    return (
        text if len(ids) <= limit else f"{text} (the model reads {limit} tokens; {len(ids) - limit} more are cut off)"
    )


def _cost(
    pipe: Any,
    run: Run,
    planned: CallPlan | None,
    loaded: Sequence[LoadedConcept | None],
    known_costs: dict[str, Counted],
) -> RunCost:
    width, height = size_of(pipe, run.scene)
    given: dict[str, Any] = {
        "steps": _steps(pipe, run, planned), "guidance_scale": run.guidance_scale, "width": width, "height": height,
    }  # fmt: skip

    def count(method: Settings | None, concepts: Sequence[LoadedConcept]) -> Counted:
        """Counts, which takes a second, unless it is known. Prompts, seed and how large weights are do not matter."""
        files = [(_priced(concept.concept), [file.sha256 for file in concept.files]) for concept in concepts]
        key = sha256(repr((given, run.scheduler, method, files)).encode()).hexdigest()
        if key not in known_costs or not all(concept.files for concept in concepts):  # adapters may be other ones now
            known_costs[key] = count_run(pipe, method, concepts, **given, scheduler=scheduler_of(pipe, run))
            for old in list(known_costs)[:-_KNOWN_COSTS]:
                del known_costs[old]
        return known_costs[key]

    plain = count(None, ())
    if planned is None:
        return RunCost(plain.rows, plain.flops, plain.flops)
    flops = count(planned.choice.method, [concept for concept in loaded if concept]).flops
    return RunCost(planned.cost.words, flops, plain.flops)


def _priced(concept: Concept) -> Concept:
    """A concept as far as its cost depends on it: constant weights cost the same, except 0."""
    constant = None if concept.weight is None else WeightSchedule.of(concept.weight).constant
    return concept.model_copy(update={"weight": 1.0, "any_weight": None}) if constant else concept


def _steps(pipe: Any, run: Run, planned: CallPlan | None) -> int:
    """Number of steps that are run."""
    return steps_of(pipe, run) if planned is None else planned.steps


def _cost_words(pipe: Any, run: Run, planned: CallPlan | None, cost: RunCost | None) -> str:
    rows = planned.cost.words if planned is not None else cost and cost.rows
    if rows is None:
        return "not known"
    steps = _steps(pipe, run, planned)
    passes = "" if planned is None or planned.passes == steps else f", {planned.passes} passes"
    guided = pipe.guider(run.guidance_scale).scale > 1 if planned is None else planned.guided
    how = " with guidance" if guided else ", no rows for guidance"
    ratio = "" if cost is None else f"{cost.flops / cost.plain_flops:.2f} times the FLOPs of a plain image; "
    each = "" if planned is None else planned.cost.each
    return f"{ratio}{rows} rows, each a latent through the model once ({steps} steps{passes}{how}){each}"


def _method_words(run: Run, choice: Choice | None) -> str:
    """The method; one that was not asked for has the reason for the choice."""
    if choice is None:
        return "none" if not run.scene.concepts else run.method or "not known"
    name, _ = name_of(choice.method)
    return name if run.method is not None else f"{name}, because {choice.reason}"
