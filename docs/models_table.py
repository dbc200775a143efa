"""Writes the table of model families into `docs/models.md`: `python docs/models_table.py [REPORT ...]`.

The rows are made of what the classes declare, which the tests check, of the layouts of LoRA files that the tests read,
and, for what depends on how a model is stored, of tests that have passed: REPORT is what `COMMAND` writes, in this
environment. What passed is kept in `models_run.json` with its date and the version of diffusers, and stays for families
of which REPORT has no test.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from torch import Size, nn  # noqa: E402

from all_transformers import EVERY  # noqa: E402
from layouts import NAMES, layout  # noqa: E402
from lora_compose.attention.backbones import BACKBONES  # noqa: E402
from lora_compose.compose.benchmark.architectures import FAMILIES, TRANSFORMERS, without_weights  # noqa: E402
from lora_compose.pipelines.families import ComposePipeline  # noqa: E402
from lora_compose.pipelines.families.references import ReferencesPipeline  # noqa: E402
from lora_compose.pipelines.families.unets import UNetPipeline  # noqa: E402
from lora_compose.pipelines.formats.models import model_part  # noqa: E402
from lora_compose.pipelines.formats.recognise import guess_family  # noqa: E402
from lora_compose.pipelines.methods import METHODS  # noqa: E402
from trainings import PAIRED, TRAINED  # noqa: E402

PAGE, RAN = ROOT / "docs" / "models.md", ROOT / "docs" / "models_run.json"
HEADER = ("family", "methods", "from an image", "references", "control", "names in LoRA files", "train", "merge",
          "offloaded", "weights in fewer bits")  # fmt: skip
COMMAND = (
    'pytest -m "slow or not slow" -k "offload or bits" --junitxml report.xml '
    "tests/pipelines/families/test_transformer_memory.py tests/pipelines/calls/test_devices.py "
    "tests/pipelines/families/test_stable_diffusion_xl.py"
)
"""Runs the tests of the last two columns."""
_BLOCK = re.compile(r"(<!-- families -->\n).*?(<!-- end -->)", re.DOTALL)
_KEYS = re.compile(r"keys of (?:early |a )?(?:the )?(.+?)(?:'s scripts| before|,| \(| with|$)")
_UNETS = {"SD 1.x": "StableDiffusionPipeline", "SD 2.x": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline"}
_HOW = {
    "by_models": "models", "by_layers": "layers", "by_blocks": "blocks", "layerwise_casting": "float8",
    "bitsandbytes": "bitsandbytes int8", "nf4": "bitsandbytes NF4", "torchao": "torchao", "quanto": "quanto",
    "gguf": "GGUF", "sdnq": "SDNQ", "models": "models", "layers": "layers", "groups": "blocks",
}  # fmt: skip


def written(text: str) -> str:
    """The page with the table anew, and what it was made of."""
    return _BLOCK.sub(lambda found: f"{found[1]}{table()}\n\n{source()}\n{found[2]}", text)


def table() -> str:
    """The table, as Markdown."""
    ran = json.loads(RAN.read_text(encoding="utf-8"))
    lines = [HEADER, ("---",) * len(HEADER), *(row(family, ran) for family in ComposePipeline.families)]
    return "\n".join(f"| {' | '.join(line)} |" for line in sorted(lines, key=lambda line: _rank(line[0])))


def source() -> str:
    """What the last two columns were made of: dates, versions and the command, as Markdown."""
    ran = json.loads(RAN.read_text(encoding="utf-8"))
    families: dict[str, list[str]] = {}
    for family, made in sorted(ran["made"].items()):
        families.setdefault(f"{made['date']} with diffusers {made['diffusers']}", []).append(family)
    *few, most = sorted(families.items(), key=lambda item: len(item[1]))
    others = "".join(f"; {', '.join(names)} on {when}" for when, names in few)
    return (
        f"The last two columns are of tests that ran on {most[0]}{others}. The table is made of the report of\n\n"
        f"```bash\n{ran['command']}\n```"
    )


def row(family: Any, ran: Mapping[str, Mapping[str, list[str]]]) -> tuple[str, ...]:
    """What is known of a family."""
    unet = issubclass(family, UNetPipeline)
    tasks = {"image-to-image": family.image_to_image, "inpainting": family.inpainting}
    missing = refused(family)
    return (
        family.family,
        f"all but {', '.join(f'`{name}`' for name in missing)}" if missing else "all",
        ", ".join(name for name, task in tasks.items() if task is not None) or "no",
        "yes" if issubclass(family, ReferencesPipeline) else "no",
        "ControlNet, T2I-Adapter, IP-Adapter" if unet else "no",
        ", ".join(_spellings(family)),
        _trained(family),
        "yes" if merges(family) else "no",
        *(", ".join(ran[what].get(family.family, [])) or "not run" for what in ("offloaded", "fewer bits")),
    )


def _trained(family: Any) -> str:
    named = _by_class()
    paired = family.family in {named[known.plain.__name__] for known, _ in PAIRED.values()}
    alone = family.family in {named[known.plain.__name__] for known in TRAINED.values()}
    alone = alone or issubclass(family, UNetPipeline)
    return ", ".join([*(["images"] if alone else []), *(["pairs"] if paired else [])]) or "no"


def refused(family: Any) -> list[str]:
    """Methods in their default form that need what the model does not have (`resolve_call`)."""
    return [name for name, kind in METHODS.items() if kind().needs.region_attention and not _reads_regions(family)]


def merges(family: Any) -> bool:
    """Whether `lora-compose merge` recognises a LoRA of all layers as the family's, so that it has their shapes."""
    for name in filter(partial(_is_of, family), FAMILIES):
        pipe = without_weights(name)
        part = model_part(pipe)
        layers = getattr(pipe, part).named_modules()
        shapes = {
            f"{part}.{layer}.lora_{side}.weight": Size(shape)
            for layer, module in layers
            if isinstance(module, nn.Linear)
            for side, shape in (("A", (1, module.in_features)), ("B", (module.out_features, 1)))
        }
        found = guess_family(shapes, {}).family
        if found in FAMILIES and _is_of(family, found):
            return True
    return False


def outcomes(reports: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What passed in tests of how a model is stored, by family; under "made" when they ran, passed or not."""
    families = _by_class()
    found: dict[str, dict[str, Any]] = {"offloaded": {}, "fewer bits": {}, "made": {}}
    suites = (suite for path in reports for suite in ElementTree.parse(path).iter("testsuite"))
    for date, case in ((suite.attrib["timestamp"][:10], case) for suite in suites for case in suite.iter("testcase")):
        name, _, parameters = case.attrib["name"].removesuffix("]").partition("[")
        if "test_transformer_memory" in case.attrib["classname"]:
            how, _, known = parameters.partition("-")
            kind = EVERY[known].plain.__name__
        elif "offload" in name:
            how = next(one for one in ("models", "layers", "groups") if one in f"{name} {parameters}")
            xl = "xl" in f"{case.attrib['classname']} {parameters}"
            kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
        else:
            continue
        found["made"][families[kind]] = {"date": date, "diffusers": version("diffusers")}
        hows = found["fewer bits" if "bits" in name else "offloaded"].setdefault(families[kind], [])
        hows += [] if len(case) or _HOW[how] in hows else [_HOW[how]]  # what was skipped or failed has something in it
    made = found.pop("made")
    passed = {what: {family: sorted(hows) for family, hows in sorted(by.items())} for what, by in found.items()}
    return {"made": dict(sorted(made.items())), **passed}


def _by_class() -> dict[str, str]:
    """The names of families, by those of their classes and of the tests' own pipelines of diffusers' modular ones."""
    modular = {"PlainAnima": "Anima", "PlainFlux3": "FLUX.3", "PlainFlux3Distilled": "FLUX.3 distilled"}
    return {family.__name__: family.family for family in ComposePipeline.families} | modular


def _rank(name: str) -> tuple[int, str]:
    return (0 if name == HEADER[0] else 1 if name == "---" else 2, name)


def _reads_regions(family: Any) -> bool:
    if issubclass(family, UNetPipeline):
        return True
    file, name = BACKBONES[family.transformer_class.__name__].split(".")
    return getattr(import_module(f"lora_compose.attention.backbones.{file}"), name).reads_regions


def _spellings(family: Any) -> list[str]:
    """Whose names of layers are read, by the layouts of files for models of this class."""
    found = {"diffusers"}
    for known in map(layout, NAMES):
        if "refused" in known or known["family"] is None:
            continue
        fits = _is_of(family, known["family"])
        found |= {_KEYS.search(known["form"])[1]} if fits else set()  # pyright: ignore[reportOptionalSubscript]
    return sorted(found, key=str.lower)


def _is_of(family: Any, architecture: str) -> bool:
    """Whether a class opens models of an architecture."""
    if architecture in _UNETS:
        return family.__name__ == _UNETS[architecture]
    return TRANSFORMERS[architecture][0] is getattr(family, "transformer_class", None)


if __name__ == "__main__":
    if sys.argv[1:]:
        found, known = outcomes(map(Path, sys.argv[1:])), json.loads(RAN.read_text(encoding="utf-8"))
        kept = {what: dict(sorted({**known[what], **by_family}.items())) for what, by_family in found.items()}
        RAN.write_text(json.dumps({"command": COMMAND, **kept}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
