"""Export of a run: scene file, Python, command line."""

import json
import shlex
from collections.abc import Collection, Mapping, Sequence

from lora_compose.compose.files.paths import moved, moved_start, to_record
from lora_compose.compose.files.text import parse_value, to_yaml
from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUNDS
from lora_compose.compose.support.savers import OFFLOADS, Saver
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene.scene import ControlFile, IPAdapterFile, Run, Scene
from lora_compose.pipelines.scene.sources import LoraFiles, moved_files, weighted

_ASSETS = "lora_compose.compose.playground.assets"
_GUIDES = "lora_compose.compose.generate.guides"
_LOADED = {"merge", "trigger", "class_word", "alpha"}
"""Fields, beside its name, that a concept keeps from `load_concept` on."""
_SAVING = {
    Saver.TILING: "enable_tiling(pipe.vae)",
    Saver.MODEL_OFFLOAD: "pipe.enable_model_cpu_offload()",
    Saver.SEQUENTIAL_OFFLOAD: "pipe.enable_sequential_cpu_offload()",
    Saver.GRADIENT_CHECKPOINTING: "pipe.model.enable_gradient_checkpointing()",
}


def portable(run: Run, files: Mapping[str, str]) -> Run:
    """The run with the user's names of uploaded LoRAs and images (`files`, by where they are kept)."""
    concepts = tuple(
        concept.model_copy(update={"lora": moved_files(concept.lora, lambda source: files.get(source, source))})
        for concept in run.scene.concepts
    )
    scene = moved_start(run.scene, lambda path: files.get(path, path))
    return run.model_copy(update={"scene": scene.model_copy(update={"concepts": concepts})})


def scene_file(scene: Scene, beside: Collection[str] = ()) -> str:
    """The text of a scene file in YAML; the files `beside` it keep their names, others get whole paths."""
    placed = moved(scene, lambda source: source if source in beside else to_record(source))
    return to_yaml(placed.model_dump(mode="json", exclude_none=True))


def command(run: Run, savers: Sequence[Saver] = ()) -> str:
    """The command that makes the run from its scene file, with the same memory options."""
    words = ["lora-compose", "run", run.model, "--scene", "scene.yaml"]
    words += ["--method", run.method] if run.method is not None and run.scene.concepts else []
    for name, value in run.settings.items():
        words += ["--set", f"{name}={_as_yaml(value)}"]
    words += ["--seed", str(run.seed), "--steps", str(run.steps), "--guidance", repr(run.guidance_scale)]
    words += ["--scheduler", run.scheduler] if run.scheduler is not None else []
    words += ["--dtype", run.dtype] if run.dtype != "float32" else []
    words += ["--quantize", run.quantize] if run.quantize is not None else []
    words += ["--device", run.device] if run.device is not None else []
    for saver in savers:
        words += ["--save-memory", saver]
    return shlex.join(words)


def python(run: Run, savers: Sequence[Saver] = (), scheduler: str | None = None) -> str:
    """A short program that makes the run and saves its image; the model's own scheduler is left out, if it is known."""
    imports = {"lora_compose": {"ComposePipeline"}}
    lines = _opening(run, savers, imports)
    if run.scheduler is not None and run.scheduler != scheduler:
        imports.setdefault("diffusers", set()).add(run.scheduler)
        lines.append(f"pipe.scheduler = {run.scheduler}.from_config(pipe.scheduler.config)")
    for concept in run.scene.concepts:
        if concept.is_bystander:
            continue
        source = _source(concept.lora, imports)
        loaded = concept.model_dump(include={"name", *_LOADED}, exclude_none=True)
        lines.append(f"pipe.load_concept({source}, {_arguments(loaded)})")
    if run.scene.ip_adapters:
        imports.setdefault(_GUIDES, set()).add("fit_ip_adapters")
        lines.append(f"fit_ip_adapters(pipe, [{_files(run.scene.ip_adapters)}])")
    arguments = _arguments_of(run, imports)
    return (
        "import torch\n"
        + "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items()))
        + "\n"
        + "\n".join(lines)
        + "\n\nimage = pipe(\n"
        + "".join(f"    {line},\n" for line in arguments)
        + ').images[0]\nimage.save("result.png")\n'
    )


def _source(lora: LoraFiles, imports: dict[str, set[str]]) -> str:
    """The file of a concept, or a list of those that are merged, as an argument of `load_concept`."""
    if not isinstance(lora, str) and lora is not None:
        return f"[{', '.join(_source_of(*weighed, imports) for weighed in weighted(lora))}]"
    return _source_of(lora or "", 1.0, imports)


def _source_of(source: str, weight: float, imports: dict[str, set[str]]) -> str:
    model, colon, name = source.partition(":")
    if not colon or model not in PLAYGROUNDS:
        return _value(source if weight == 1 else f"{source}:{weight!r}")
    imports.setdefault(_ASSETS, set()).add("playground_lora")
    arguments = [name, *_further(model)]
    if weight == 1:
        return f"playground_lora({', '.join(map(_value, arguments))})"
    return f'f"{{playground_lora({", ".join(map(repr, arguments))})}}:{weight!r}"'


def _opening(run: Run, savers: Sequence[Saver], imports: dict[str, set[str]]) -> list[str]:
    """The lines that open the model; their imports are added."""
    source, maker = _value(run.model), "from_pretrained"
    if run.model in PLAYGROUNDS:
        imports.setdefault(_ASSETS, set()).add("playground_model")
        source = f"playground_model({', '.join(map(_value, _further(run.model)))})"
    elif run.model.endswith(".safetensors"):
        maker = "from_single_file"
    dtype = f", dtype=torch.{run.dtype}" if run.dtype != "float32" else ""
    bits = "" if run.quantize is None else f", quantize={_value(run.quantize)}"
    moved = f'.to("{run.device}")' if run.device not in (None, "cpu") and OFFLOADS.isdisjoint(savers) else ""
    lines = [f"pipe = ComposePipeline.{maker}({source}{dtype}{bits}){moved}"]
    if Saver.TILING in savers:
        imports.setdefault("lora_compose.compose.support.savers", set()).add("enable_tiling")
    return lines + [_SAVING[saver] for saver in savers]


def _further(playground: str) -> list[str]:
    """The argument that names a playground, which is left out for the first."""
    return [] if playground == PLAYGROUND else [playground]


def _arguments_of(run: Run, imports: dict[str, set[str]]) -> list[str]:
    """The arguments of the call."""
    scene = run.scene
    lines = [f"prompt={_value(scene.prompt)}"]
    if scene.concepts:
        listed = [
            concept.model_dump(exclude={"lora"} if concept.is_bystander else {"lora", *_LOADED}, exclude_none=True)
            for concept in scene.concepts
        ]
        listed = [
            {name: value for name, value in fields.items() if (name, value) != ("weight", 1.0)} for fields in listed
        ]
        if any(len(fields) > 1 for fields in listed):
            imports["lora_compose"].add("Concept")
            concepts = "".join(f"        {_call('Concept', fields)},\n" for fields in listed)
            lines.append(f"concepts=[\n{concepts}    ]")
        else:
            lines.append(f"concepts=[{', '.join(_value(fields['name']) for fields in listed)}]")
        if run.method is not None and run.settings:
            kind = METHODS[run.method].__name__
            imports["lora_compose"].add(kind)
            lines.append(f"method={_call(kind, run.settings)}")
        elif run.method is not None:
            lines.append(f"method={_value(run.method)}")
    size = f"({scene.width}, {scene.height})"
    lines += [f"**pipe.sized{size}"] if scene.width is not None and scene.height is not None else []
    lines += [f"{name}={_value(value)}" for name, value in scene.start.items()]
    lines += [f"image=[{', '.join(map(_value, scene.references))}]"] if scene.references else []
    for kind, given in (("ControlFile", scene.controls), ("IPAdapterFile", scene.ip_adapters)):
        if given:
            imports.setdefault("lora_compose.pipelines.scene.scene", set()).add(kind)
    if scene.controls:
        imports.setdefault(_GUIDES, set()).add("controls_of")
        lines.append(f"control=controls_of(pipe, [{_files(scene.controls)}], {size})")
    if scene.ip_adapters:
        imports.setdefault(_GUIDES, set()).add("ip_adapter_arguments")
        lines.append(f"**ip_adapter_arguments([{_files(scene.ip_adapters)}], {size})")
    # Families differ in the names of what guides them, and whether there is any.
    guided = f"**pipe.guided({run.guidance_scale!r}, {_value(scene.negative_prompt or None)})"
    lines += [f"num_inference_steps={run.steps}", guided]
    return [*lines, f"generator=torch.Generator().manual_seed({run.seed})"]


def _files(given: Sequence[ControlFile | IPAdapterFile]) -> str:
    return ", ".join(_call(type(guide).__name__, guide.model_dump(exclude_defaults=True)) for guide in given)


def _call(kind: str, fields: Mapping[str, object]) -> str:
    return f"{kind}({_arguments(fields)})"


def _arguments(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: object) -> str:
    """A value as Python code; text is in double quotes, for which JSON has the same rules."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _as_yaml(value: object) -> str:
    """As `--set` reads it back; JSON where plain text would be read as something else."""
    text = str(value)
    return text if isinstance(value, str) and parse_value(text) == text else json.dumps(value, ensure_ascii=False)
