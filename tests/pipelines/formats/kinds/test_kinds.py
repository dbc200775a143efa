"""A kind of LoRA is one file and one line of the registry, as CONTRIBUTING.md says."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from components import sd_unet
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.recognise import form
from reference import dense

ROOT = Path(__file__).resolve().parents[4]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = f"lora_unet_{LAYER.replace('.', '_')}"

YOUR_KIND = '''
"""A change of a square weight's diagonal."""

import torch

from lora_compose.pipelines.formats.kinds.kind import Kind, needed

DIAGONAL = Kind(
    "diagonal",
    {"diagonal": r"\\.diagonal"},
    sides=lambda shapes: (needed(shapes, "diagonal")[0][0],) * 2,
    delta=lambda tensors: torch.diag(tensors["diagonal"]),
)
'''


@pytest.fixture
def diagonal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new kind: its file, and its line in the registry."""
    path = tmp_path / "your_kind.py"
    path.write_text(YOUR_KIND, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("your_kind", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, module.DIAGONAL))


@pytest.fixture(scope="module")
def parts() -> Any:
    return SimpleNamespace(unet=sd_unet())


@pytest.mark.usefixtures("diagonal")
def test_a_new_kind_is_recognised_checked_scaled_and_cut(parts: Any, tmp_path: Path) -> None:
    path, numbers = tmp_path / "it.safetensors", torch.arange(1.0, 9.0)
    save_file({f"{KEY}.diagonal": numbers}, path)
    file = read_lora(path)
    assert form([*file.tensors]) == "diagonal, keys of kohya's scripts"
    found = match(file, parts)
    assert found.complete
    torch.testing.assert_close(dense(found.model[LAYER]), torch.diag(numbers))
    cut = match(file, parts, max_rank=3)
    assert "1 layers have more rank than max_rank=3 and are cut to it" in cut.report
    assert cut.error == pytest.approx(float(numbers[:5].norm() / numbers.norm()), rel=1e-4)
    save_file({f"{KEY}.diagonal": torch.ones(9)}, path)
    with pytest.raises(LoraError, match=rf"unet\.{LAYER}: its change is 9 x 9, the model's weight 8 x 8"):
        match(read_lora(path), parts)
    save_file({f"{KEY}.diagonal": numbers, f"{KEY}.lokr_w1": torch.ones(8, 8)}, path)
    with pytest.raises(LoraError, match="it has diagonal beside the tensors of a LoKr; expected one kind by layer"):
        match(read_lora(path), parts)


def test_without_its_line_the_file_is_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    save_file({f"{KEY}.diagonal": torch.ones(8)}, path)
    with pytest.raises(LoraError, match="is not a LoRA"):
        read_lora(path)


def test_tensors_of_two_kinds_in_one_layer_are_refused(parts: Any, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    tensors = {"lora_down.weight": torch.ones(1, 8), "lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4)}
    save_file({f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(LoraError, match="it has down beside the tensors of a LoKr"):
        match(read_lora(path), parts)


def test_no_other_file_knows_the_tensors_and_numbers_of_a_kind() -> None:
    """But "down", "mid", "up", "bias" and "norm", which are words of other meanings as well."""
    plain = (kinds.LOW_RANK, kinds.TUCKER, kinds.LEFT_OUT)
    slots = {slot for kind in kinds.KINDS if kind not in plain for slot in kind.endings}
    slots |= {slot for kind in kinds.KINDS for slot in (*kind.numbers, *kind.flags)}
    assert len(slots) > 18
    for folder in ("pipelines/formats", "pipelines/concepts", "pipelines/merging", "compose/lora"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name != "kinds":
                text = path.read_text(encoding="utf-8")
                named = set(re.findall(r'"(\w+)"', text)) & slots
                named |= set(re.findall(r"kinds(?:\.| import .*)\b(DORA|OFT\w*|LOKR|LOHA|DIFFERENCE|TUCKER)\b", text))
                assert not named, f"{path.relative_to(ROOT)} names {', '.join(sorted(named))}"


def test_the_files_that_a_kind_touches_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Add a kind of LoRA")[2].partition("\n## ")[0]
    named = {
        name for name in re.findall(r"`([\w/.-]+(?:\.py|\.md|/))`", section) if "/" in name and "your_" not in name
    }
    assert named >= {"pipelines/formats/kinds/__init__.py", "tests/fixtures/lora_layouts/", "docs/lora-files.md"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
