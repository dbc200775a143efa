"""A call, checked and resolved: everything that can be checked before anything is changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import (
    Backbone,
    Installation,
    StepCaches,
    check_caches,
    install,
    reference_factor,
)  # fmt: skip
from lora_compose.attention.bank_cache import Handle
from lora_compose.attention.device import dtype_of
from lora_compose.pipelines.calls.call import Call, Concepts, check_call, steps_to_record
from lora_compose.pipelines.calls.host import Host
from lora_compose.pipelines.calls.memory import check_size, warn_of_size
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept, check_blocks
from lora_compose.pipelines.concepts.overload import (
    FEW_STEPS,
    HELD_IN_FEW_STEPS,
    WARNED,
    WARNED_IN_FEW_STEPS,
    joint_change,
)
from lora_compose.pipelines.concepts.overload import warning as overload_warning
from lora_compose.pipelines.concepts.tags import check_no_tags
from lora_compose.pipelines.control.image_prompts import PreparedImagePrompts
from lora_compose.pipelines.control.prepare import prepare_control
from lora_compose.pipelines.control.prepared import PreparedControl
from lora_compose.pipelines.denoising.attention_log import AttentionLog
from lora_compose.pipelines.denoising.denoiser import Denoiser
from lora_compose.pipelines.denoising.sampler import Sampler
from lora_compose.pipelines.denoising.session import Runner, Session, SetRunner
from lora_compose.pipelines.formats.models import model_part
from lora_compose.pipelines.images.from_image import region_in_pixels
from lora_compose.pipelines.methods import ASKED_FOR, Choice, Settings, choose_method, make_method, name_of
from lora_compose.pipelines.scene.canvas import Canvas, images_of
from lora_compose.pipelines.scene.given import is_set
from lora_compose.pipelines.scene.regions import region_mask
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.notes import held, warn_first
from lora_compose.pipelines.text.conditioning import TokenMasks, agreed
from lora_compose.pipelines.text.emphasis import plain_text, refuse_weights
from lora_compose.pipelines.text.encoder import EncodedText, FamilyEncoder, PromptEncoder, Prompts, TextEncoder
from lora_compose.pipelines.text.long_prompts import LongTokenizer, Reading
from lora_compose.pipelines.text.missing import Described
from lora_compose.pipelines.text.textual_inversion import TextualInversions
from lora_compose.pipelines.text.tokens import Tokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PromptsOfSet:
    """The prompts, by index in the call, that have one concept set, and the positions of its words in them."""

    concepts: ConceptSet
    indices: tuple[int, ...]
    token_masks: TokenMasks


@dataclass(frozen=True)
class ResolvedCall:
    """A call, checked and resolved, as the denoising loop runs it.

    Attributes:
        sets: The concept sets, each with its prompts.
        tokenizers: Tokenizers of the prompts, one for each text that the model reads.
        controls: Prepared ControlNets, T2I-Adapters and images of IP-Adapters.
        sampler: A copy of the scheduler with its timesteps, on the CPU.
        reading: How texts with weights, and long ones, are read; None if there are none.
        row_factor: How much dearer reference images make a row, in FLOPs.
    """

    call: Call
    choice: Choice
    concepts: ConceptSet
    sets: Sequence[PromptsOfSet]
    canvas: Canvas
    textual_inversions: TextualInversions
    tokenizers: Sequence[Tokenizer]
    controls: Sequence[PreparedControl | PreparedImagePrompts]
    sampler: Sampler
    reading: Reading | None = None
    row_factor: float = 1.0

    @contextmanager
    def installed(self, host: Host) -> Iterator["InstalledCall"]:
        """Installs the LoRAs in the model inside this block."""
        model: Any = self.canvas.backbone.model
        names = [concept.name for concept in self.concepts.concepts]
        with (
            install(
                self.canvas.backbone,
                [loaded.lora for loaded in self.concepts.loaded],
                device=self.canvas.device,
                dtype=dtype_of(model),
                silence=names,
                kept=self.concepts.kept(model_part(host), host.banks),
            ) as installation,
            StepCaches.opened(model) as caches,
        ):
            yield InstalledCall(self, host, installation, caches)

    @property
    def cfg_scale(self) -> float:
        """Scale of the guidance; 1 or less is none, e.g. where the model takes it as an input."""
        return self.call.sampling.guider.scale

    def session(self, part: PromptsOfSet, runner: SetRunner, encoder: TextEncoder) -> Session:
        """The session of one concept set, for what runs the passes and encodes the texts of the call."""
        texts = self.call.prompts.first
        prompts = Prompts(
            None if texts is None else tuple(texts[index] for index in part.indices),
            part.token_masks, part.concepts, encoder, partial(_find, self.tokenizers), part.indices, runner.canvas,
        )  # fmt: skip
        denoiser: Runner = runner
        if len(self.sets) > 1:
            denoiser = runner.of_set(part.concepts, images_of(part.indices, self.canvas.images_per_prompt))
        return Session(part.concepts, prompts, denoiser, self.call.sampling.guider)


@dataclass(frozen=True)
class InstalledCall:
    """A resolved call whose LoRAs are in the model of its host."""

    resolved: ResolvedCall
    host: Host
    installation: Installation
    caches: StepCaches

    def sessions(
        self, encode: FamilyEncoder, sampler: Sampler, inputs: Mapping[str, Any]
    ) -> tuple[Denoiser, list[Session]]:
        """The denoiser, and the session of each concept set; `inputs` are further arguments of every forward pass."""
        resolved, host, steps = self.resolved, self.host, len(sampler.schedule.timesteps)
        canvas, concepts = resolved.canvas, resolved.concepts
        log = AttentionLog(canvas, steps_to_record(resolved.call.composition.record_attention, steps))
        denoiser = Denoiser(
            canvas.backbone, self.installation, sampler, canvas, concepts, resolved.controls,
            {**resolved.call.inputs, **inputs}, log, self.caches,
        )  # fmt: skip
        denoiser.cost.row_factor = resolved.row_factor
        reading = {} if resolved.reading is None else {"reading": resolved.reading}

        def here(prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None) -> EncodedText:
            return encode(prompts, negative_prompts, canvas.device, **reading)

        read = resolved.textual_inversions.read_by(host, here)
        encoder = PromptEncoder(concepts, host.components, read, canvas, steps, host.banks)
        return denoiser, [resolved.session(part, denoiser, encoder) for part in resolved.sets]


def resolve_call(host: Host, call: Call) -> ResolvedCall:
    """Checks and resolves a call; changes nothing. Raises ValueError for anything that does not fit together."""
    backbone, device = host.backbone_of(call), host.runs_on  # asked once: diffusers looks through all models for it
    images = len(call.prompts) * call.size.images_per_prompt
    check_size(backbone, host.vae_scale_factor, device, call.size.width, call.size.height, images)
    loaded, concepts_of = resolve_sets(host, call.composition.concepts, len(call.prompts))
    return _resolved(host, call, backbone, device, loaded, concepts_of)


@held()  # a call that is refused has no warnings
def _resolved(
    host: Host,
    call: Call,
    backbone: Backbone,
    device: torch.device,
    asked: tuple[LoadedConcept, ...],
    concepts_of: list[list[int]],
) -> ResolvedCall:
    """The call with these concepts; by prompt the indices of its own."""
    warn_of_size(host, call.size.width, call.size.height)
    placed = _placed(host, call, asked)
    sets = [placed.subset(columns) for columns in concepts_of]
    choice = resolve_choice(call.composition.method, placed.loaded, call.prompts.first, sets)
    _check_needs(call, choice.method, backbone)
    canvas, scheduler = _canvas(host, call, backbone, device), deepcopy(host.scheduler)
    sampler = Sampler(scheduler, host.schedule(scheduler, call.sampling, canvas.on(CPU), call.source))
    sampling = call.sampling  # of an image to start from, fewer steps than these are run
    steps = sampler.schedule.steps if sampling.has_schedule else sampling.num_inference_steps or 1
    few_steps = sampling.guider.scale <= 1 and steps <= FEW_STEPS
    concepts = _guarded(placed, sets, choice.method, canvas, len(sampler.schedule.timesteps), few_steps)
    sets = [concepts.subset(columns) for columns in concepts_of]

    textual_inversions = TextualInversions.of(concepts.loaded, host.components)
    tokenizers, reading = _readers(host, call, textual_inversions, asked)
    plain = _of_plain_texts(call)
    of_sets = _by_set(plain, tokenizers, sets, concepts_of)

    if canvas.painted is not None:
        _check_painted(concepts.loaded, canvas, canvas.painted)
    host.check_start(plain, canvas)
    controls = _controls(host, call, canvas, sets)
    steps_to_record(call.composition.record_attention, len(sampler.schedule.timesteps))  # raises for others
    return ResolvedCall(
        plain, choice, concepts, of_sets, canvas, textual_inversions, tokenizers, controls, sampler,
        reading, reference_factor(backbone, canvas.latent_grid, of_sets[0].token_masks.trigger.shape[1]),
    )  # fmt: skip


def _placed(host: Host, call: Call, asked: Sequence[LoadedConcept]) -> ConceptSet:
    """The concepts with plain texts, and with their regions where the image has them, after the checks of a call."""
    in_pixels = [_region_in_pixels(call, entry) for entry in asked]
    loaded = tuple(map(_without_weights, in_pixels))
    check_call(call, loaded)
    if call.source is not None:
        loaded = tuple(map(call.source.placed, loaded))
    for entry in loaded:
        check_blocks(entry, host.model)
    concepts = ConceptSet(loaded)
    _check_positions(call, concepts)
    return concepts


def _check_needs(call: Call, method: Settings, backbone: Backbone) -> None:
    """Raises ValueError for a method that needs what the model, the call or PyTorch's mode does not have."""
    needs = method.needs
    check_model_for(method, reads_regions=backbone.reads_regions)
    if needs.gradients and torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name_of(method)[0]} takes gradients, which torch.inference_mode() has not: use draft, regional, "
            "tara, merge or switch, which take none, or call it outside torch.inference_mode()"
        )
    check_caches(backbone.model, differentiates=needs.gradients or needs.region_attention)
    if call.source is not None:
        check_start_for(method, call.source.strength)


def check_model_for(method: Settings, *, reads_regions: bool) -> None:
    """Raises ValueError for a method that needs a text for each region, with a model whose attention reads none."""
    if method.needs.region_attention and not reads_regions:
        raise ValueError(
            f"{name_of(method)[0]} needs cross-attention that reads a text for each region, which UNets and "
            "Anima have; use draft, which needs no regions, regional with a region for each subject, or tara"
        )


def check_start_for(method: Settings, strength: float) -> None:
    """Raises ValueError for a method that moves start noise, in a call that starts from an image."""
    if strength < 1 and method.needs.start_noise:
        raise ValueError(
            "this method moves start noise, and with an image the latents are the image; give lora-composer "
            "reinit='off' or draft drafts=1, or the call strength=1"
        )


def _readers(
    host: Host, call: Call, textual_inversions: TextualInversions, asked: Sequence[LoadedConcept]
) -> tuple[Sequence[Tokenizer], Reading | None]:
    """Tokenizers of the texts of a call, and how texts with weights and long ones are read."""
    of_host = host.prompt_tokenizers(textual_inversions, call.prompts.length)
    tokenizers = of_host if call.prompts.tokenizers is None else call.prompts.tokenizers
    own = [text for entry in asked for text in (entry.concept.prompt, entry.concept.negative_prompt) if text]
    reading = _reading(host, call, tokenizers, own)
    if reading is not None and reading.longest > 1:
        return [LongTokenizer(tokenizer, reading.longest) for tokenizer in tokenizers], reading
    return tokenizers, reading


def _of_plain_texts(call: Call) -> Call:
    """The call with prompts that have no marks of weights."""
    texts = call.prompts.texts
    plain = None if texts is None else [[plain_text(text) for text in column] for column in texts]
    return replace(call, prompts=replace(call.prompts, texts=plain))


def _by_set(
    call: Call, tokenizers: Sequence[Tokenizer], sets: Sequence[ConceptSet], concepts_of: Sequence[Sequence[int]]
) -> list[PromptsOfSet]:
    """Each concept set once, with the prompts that have it; `sets` has one for each prompt."""
    prompts_of: dict[tuple[int, ...], list[int]] = {}
    for prompt, columns in enumerate(concepts_of):
        prompts_of.setdefault(tuple(columns), []).append(prompt)
    return [
        PromptsOfSet(entry, tuple(prompts), _token_masks(call, tokenizers, entry.concepts, prompts))
        for entry, prompts in ((sets[prompts[0]], prompts) for prompts in prompts_of.values())
    ]


def _canvas(host: Host, call: Call, backbone: Backbone, device: torch.device) -> Canvas:
    size, scale = call.size, host.vae_scale_factor
    grid = size.height // scale, size.width // scale
    painted = None if call.source is None else call.source.painted(grid)
    return Canvas((size.height, size.width), grid, len(call.prompts), size.images_per_prompt, device, backbone, painted)


def _controls(
    host: Host, call: Call, canvas: Canvas, sets: Sequence[ConceptSet]
) -> list[PreparedControl | PreparedImagePrompts]:
    """Prepared controls that act, and images of IP-Adapters."""
    regions = [{concept.name: concept.region for concept in entry.concepts} for entry in sets]
    ready = [prepare_control(control, host.model, canvas, regions) for control in call.composition.controls]
    of_images = [] if call.image_prompts is None else [call.image_prompts]
    return [control for control in ready if not control.control.is_off] + of_images


def _guarded(
    concepts: ConceptSet, sets: Sequence[ConceptSet], method: Settings, canvas: Canvas, steps: int, few_steps: bool
) -> ConceptSet:
    """Warns of LoRAs that together change more than each was trained to, and keeps them to the method's limit.

    Args:
        few_steps: Whether the call is one of a few-step model, which may take less.
    """
    limits: dict[Handle, dict[str, float]] = {}  # concepts with one LoRA keep one, of which the strongest counts
    model = canvas.backbone.model
    for each in sets:
        for group in method.acting_together(each, canvas):
            loaded = [each.loaded[i] for i in group.columns]
            if (joint := joint_change(loaded, model, steps)) is None:
                continue
            otherwise = group.otherwise
            if group.limit is not None:
                for name, scale in joint.scales(group.limit, group.layers).items():
                    for entry in loaded:
                        mine = limits.setdefault(entry.handle(entry.factors.part), {})
                        mine[name] = min(scale, mine.get(name, 1.0))
                joint = joint.within(group.limit)
                if not joint.of_weights:
                    continue
            elif group.has_limit and not joint.of_weights.issuperset(joint.by_layer):
                limit = HELD_IN_FEW_STEPS if few_steps else 1
                otherwise = f", or {type(method).__name__}(limit={limit}){otherwise}"
            if joint.ratio > (WARNED_IN_FEW_STEPS if few_steps else WARNED):
                about = tuple(entry.concept.name for entry in loaded), joint.weights, joint.ratio, few_steps
                warn_first(about, partial(overload_warning, loaded, joint, model, otherwise, few_steps=few_steps))
    if not limits:
        return concepts
    of_each = (limits.get(entry.handle(entry.factors.part), {}) for entry in concepts.loaded)
    return ConceptSet(
        tuple(replace(entry, limits=of_it) for entry, of_it in zip(concepts.loaded, of_each, strict=True))
    )


def _without_weights(loaded: LoadedConcept) -> LoadedConcept:
    """A concept whose own texts are plain."""
    texts = {name: getattr(loaded.concept, name) for name in ("prompt", "negative_prompt")}
    plain = {name: plain_text(text) for name, text in texts.items() if text}
    return replace(loaded, concept=loaded.concept.model_copy(update=plain)) if plain else loaded


def _reading(host: Host, call: Call, tokenizers: Sequence[Tokenizer], others: Sequence[str]) -> Reading | None:
    prompts, negative = call.prompts.texts or (), call.prompts.negative
    all_texts = [*(text for column in (*prompts, *negative) for text in column), *others]
    check_no_tags(all_texts)
    if host.reads_weights and prompts:
        reading = Reading.of(tokenizers, prompts, negative, others, in_chunks=host.reads_in_chunks)
        if reading is not None and call.prompts.negative_embeds is not None and call.sampling.guider.scale > 1:
            raise ValueError(
                "negative_prompt_embeds do not go with weights in prompts, nor with prompts that are longer than a "
                "text encoder reads at once; give negative_prompt"
            )
        return reading
    refuse_weights(all_texts, "go with a prompt, and this call has embeddings" if host.reads_weights else None)
    return None


def _region_in_pixels(call: Call, loaded: LoadedConcept) -> LoadedConcept:
    size = (call.size.width, call.size.height) if call.source is None else call.source.image_size
    return region_in_pixels(loaded, *size)


def _check_painted(loaded: Sequence[LoadedConcept], canvas: Canvas, painted: Tensor) -> None:
    """Raises ValueError for regions that lie outside of the painted cells."""
    for entry in loaded:
        region = entry.concept.region
        if region is None:
            continue
        if not (region_mask(region, canvas.image_size, canvas.latent_grid, sharp=True) * painted).any():
            raise ValueError(
                f"the region of concept {entry.concept.name!r} lies outside of the mask, where nothing is painted; "
                "move it, or widen mask_image"
            )


def _check_positions(call: Call, concepts: ConceptSet) -> None:
    unknown = (call.composition.token_positions or {}).keys() - {concept.name for concept in concepts.concepts}
    if unknown:
        raise ValueError(f"token_positions names {sorted(unknown)}, which are not among the concepts of this call")


def resolve_choice(
    method: str | Settings | None,
    concepts: Sequence[Described],
    prompts: Sequence[str] | None,
    concept_sets: Sequence[ConceptSet] | None = None,
) -> Choice:
    """The method of a call, and why it is this one; None chooses and logs why (`choose_method`)."""
    if method is not None:
        return Choice(make_method(method), ASKED_FOR)
    return choose_method(concepts, prompts, concept_sets)


def resolve_sets(host: Host, asked: Concepts, prompts: int) -> tuple[tuple[LoadedConcept, ...], list[list[int]]]:
    """All concepts of a call with so many prompts, and by prompt the indices of its own.

    A concept that is equal in several prompts counts once; with another weight or region it counts separately. Raises
    ValueError for mixtures of concepts and lists of them, and another number of lists than prompts.
    """
    given: Any = asked
    entries: Any = [given] if isinstance(asked, str | Concept) else given
    if not any(map(is_set, entries)):
        loaded = host.resolve_concepts(given)
        return loaded, [list(range(len(loaded)))] * prompts
    if not all(map(is_set, entries)):
        raise ValueError(
            "concepts must be names and Concepts for all prompts, or a list for each prompt, but not a mixture of both"
        )
    if len(entries) != prompts:
        raise ValueError(f"there are concepts for {len(entries)} prompts, but {prompts} prompts")
    known: list[LoadedConcept] = []
    concepts: list[Concept] = []
    columns = []
    for concept_set in map(host.resolve_concepts, entries):
        for loaded in concept_set:
            if loaded.concept not in concepts:  # compared one by one: factors on blocks have no hash
                known.append(loaded)
                concepts.append(loaded.concept)
        columns.append([concepts.index(loaded.concept) for loaded in concept_set])
    return tuple(known), columns


def _token_masks(
    call: Call, tokenizers: Sequence[Tokenizer], concepts: Sequence[Concept], indices: Sequence[int]
) -> TokenMasks:
    """Token masks of a concept set's words in its prompts, which have these indices."""
    positions, prompts = call.composition.token_positions, call.prompts
    if prompts.embeds is not None:
        own = {concept.name: (positions or {}).get(concept.name, ()) for concept in concepts}
        return TokenMasks.of_positions(own, len(prompts), prompts.embeds.shape[1], concepts, indices)
    if positions is not None:
        raise ValueError("token_positions go with prompt_embeds; with a prompt, words are found by their triggers")
    elsewhere = {concept.name for concept in concepts if concept.prompt is not None}
    texts = [[column[index] for index in indices] for column in prompts.texts or ()]
    return find_in(tokenizers, concepts, texts, optional=elsewhere)


def _find(
    tokenizers: Sequence[Tokenizer], concepts: Sequence[Concept], prompts: Sequence[str], names: Any, mentions: Any
) -> TokenMasks:
    """A `Finder` for texts that all tokenizers read."""
    prompts = [plain_text(prompt) for prompt in prompts]
    return find_in(tokenizers, concepts, [prompts] * len(tokenizers), names=names, mentions=mentions)


def find_in(
    tokenizers: Sequence[Tokenizer], concepts: Sequence[Concept], texts: Sequence[Sequence[str]], **how: Any
) -> TokenMasks:
    """Token masks of words; they must be equal for all tokenizers, whose features are concatenated."""
    masks = [
        TokenMasks.of_prompts(tokenizer, prompts, concepts, **how)
        for tokenizer, prompts in zip(tokenizers, texts, strict=True)
    ]
    return agreed(masks, concepts)
