"""Export of a run: scene file, Python, command line."""

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_compose.compose.files.scenes import write_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.scene import Run, Scene


def portable(run: Run, files: Mapping[str, str]) -> Run:
    """The run with uploaded LoRAs named as their owner named them, not as this session stores them.

    Args:
        run: As it was made.
        files: Original names by where the files are kept.
    """
    concepts = tuple(
        concept.model_copy(update={"lora": files.get(concept.lora or "", concept.lora)})
        for concept in run.scene.concepts
    )
    return run.model_copy(update={"scene": run.scene.model_copy(update={"concepts": concepts})})


def scene_file(scene: Scene) -> str:
    """The text of a scene file in YAML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.yaml"
        write_scene(scene, path)
        return path.read_text(encoding="utf-8")


def command(run: Run, savers: Sequence[Saver] = (), scene: str = "scene.yaml") -> str:
    """The command that makes the run from its scene file, with the same memory options."""
    words = ["lora-compose", "run", run.model, "--scene", scene]
    words += ["--method", run.method] if run.method is not None and run.scene.concepts else []
    for name, value in run.settings.items():
        words += ["--set", f"{name}={_as_yaml(value)}"]
    words += ["--seed", str(run.seed), "--steps", str(run.steps), "--guidance", repr(run.guidance_scale)]
    words += ["--scheduler", run.scheduler] if run.scheduler is not None else []
    words += ["--dtype", run.dtype] if run.dtype != "float32" else []
    words += ["--device", run.device] if run.device is not None else []
    for saver in savers:
        words += ["--save-memory", saver]
    return shlex.join(words)


def python(run: Run, savers: Sequence[Saver] = ()) -> str:
    """A program that makes the run, with the same memory options, and saves the image with its record."""
    scene = run.scene
    concepts = "".join(f"        {_call('Concept', concept.model_dump(exclude_none=True))},\n" for concept in
                       scene.concepts)  # fmt: skip
    fields = run.model_dump(exclude={"scene"}, exclude_none=True)
    lines = "".join(f"    {name}={dict(value) if name == 'settings' else value!r},\n" for name, value in fields.items())
    known = "from lora_compose.compose.support.savers import Saver\n" if savers else ""
    opened = [f"[{', '.join(f'Saver.{saver.name}' for saver in savers)}]"] if savers else []
    return (
        "from lora_compose import Concept, Run, Scene\n"
        "from lora_compose.compose.files import save_image\n"
        f"from lora_compose.compose.generate import make, open_model\n{known}\n"
        "scene = Scene(\n"
        f"    prompt={scene.prompt!r},\n"
        f"    negative_prompt={scene.negative_prompt!r},\n"
        f"    concepts=(\n{concepts}    ),\n"
        f"    width={scene.width!r},\n"
        f"    height={scene.height!r},\n"
        ")\n"
        f"run = Run(\n    scene=scene,\n{lines})\n"
        f"made = make(open_model({', '.join(['run', *opened])}), run)\n"
        'print(save_image(made.image, "picture.png", made.record))\n'
    )


def _call(kind: str, fields: Mapping[str, object]) -> str:
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def _as_yaml(value: object) -> str:
    """As `--set` reads it back; JSON where plain text would be read as something else."""
    text = str(value)
    return text if isinstance(value, str) and parse_value(text) == text else json.dumps(value, ensure_ascii=False)
