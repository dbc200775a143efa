"""T-LoRAs act with as many ranks as their header says for the noise of a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from components import random_lora, save_lora, seeded, tiny_pipeline
from lora_compose.attention import LoraFactors
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from lora_compose.pipelines.formats.layers import by_layer
from lora_compose.pipelines.formats.rank_schedule import RankSchedule, rank_schedule
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but
from reference import relative_error

LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"
ANIMA = {"ss_tlora_min_rank": "1", "ss_tlora_alpha_rank_scale": "1.0", "ss_tlora_max_timestep": "1.0"}
RANK, ALPHA = 4, 2.0
PROMPT = "a sks cat and a zwx dog"


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def begun_at_vectors(pipe: Any, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The tensors of a file for some layers, and the change of each by rank."""
    torch.manual_seed(3)
    tensors: dict[str, Tensor] = {}
    changes = {}
    for name in names:
        weight = pipe.unet.get_submodule(name).weight
        outputs, inputs = len(weight), weight[0].numel()
        q, p, base_q, base_p = (torch.randn(s) for s in ((RANK, inputs), (outputs, RANK)) * 2)
        scales, base = torch.randn(1, RANK), torch.randn(1, RANK)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{key}.q_layer.weight": q, f"{key}.p_layer.weight": p, f"{key}.lambda_layer": scales,
            f"{key}.base_q.weight": base_q, f"{key}.base_p.weight": base_p, f"{key}.base_lambda_buf": base,
            f"{key}.alpha": torch.tensor(ALPHA),
        }  # fmt: skip
        changes[name] = [
            ALPHA / RANK
            * (scales[0, i] * torch.outer(p[:, i], q[i]) - base[0, i] * torch.outer(base_p[:, i], base_q[i]))
            .view(weight.shape)
            for i in range(RANK)
        ]  # fmt: skip
    return tensors, changes


@pytest.mark.parametrize("name", [LINEAR, CONVOLUTION])
def test_what_it_began_with_is_subtracted(pipe: Any, tmp_path: Path, name: str) -> None:
    tensors, changes = begun_at_vectors(pipe, (name,))
    save_file(tensors, tmp_path / "it.safetensors", ANIMA)
    factors = match(read_lora(tmp_path / "it.safetensors"), pipe)
    assert factors.complete
    expected = torch.stack(changes[name]).sum(dim=0)
    assert relative_error(factors.model[name].delta(), expected) < 1e-6


def test_without_what_it_began_with_it_is_refused(pipe: Any, tmp_path: Path) -> None:
    tensors, _ = begun_at_vectors(pipe, (LINEAR,))
    save_file({key: it for key, it in tensors.items() if "base" not in key}, tmp_path / "it.safetensors")
    with pytest.raises(LoraError, match=r"without its initial singular vectors .* LyCORIS recomputes them"):
        match(read_lora(tmp_path / "it.safetensors"), pipe)


@pytest.mark.parametrize("slot", ["q_layer.weight", "p_layer.weight", "lambda_layer", "base_p.weight"])
def test_tensors_that_do_not_fit_each_other_are_refused(pipe: Any, tmp_path: Path, slot: str) -> None:
    tensors, _ = begun_at_vectors(pipe, (LINEAR,))
    key = next(key for key in tensors if key.endswith(slot))
    whole = tensors.pop(key)
    for damaged, message in (
        ({}, "incomplete|initial singular vectors"),
        ({key: whole[:, 1:].contiguous()}, "do not fit each other"),
    ):
        save_file(tensors | damaged, tmp_path / "it.safetensors")
        with pytest.raises(LoraError, match=message):
            match(read_lora(tmp_path / "it.safetensors"), pipe)


@pytest.mark.parametrize(("least", "exponent", "last"), [(1, 1.0, 1.0), (2, 0.5, 1.0), (1, 2.0, 1000.0), (4, 1.0, 0.6)])
def test_as_many_ranks_act_as_the_authors_formula_says(least: int, exponent: float, last: float) -> None:
    schedule = RankSchedule(least, 16, exponent, last)
    for timestep in range(0, 1001, 7):
        t = timestep if last > 1 else timestep / 1000
        share = (last - t) / last
        expected = int(share**exponent * (16 - least)) + least if share > 0 else least
        assert schedule.at(float(timestep), 1000) == expected
    assert schedule.at(0.0, 1000) == 16


def schedule_of(pipe: Any, path: Path, metadata: dict[str, str], **tensors: Tensor) -> tuple[RankSchedule | None, str]:
    key = f"lora_unet_{LINEAR.replace('.', '_')}"
    weight = pipe.unet.get_submodule(LINEAR).weight
    plain = {"lora_down.weight": torch.ones(RANK, weight.shape[1]), "lora_up.weight": torch.ones(len(weight), RANK)}
    save_file({f"{key}.{slot}": it for slot, it in {**plain, **tensors}.items()}, path, metadata)
    factors = match(read_lora(path), pipe)
    return factors.ranks, factors.report


def test_the_schedule_is_read_from_the_header(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    assert schedule_of(pipe, path, ANIMA)[0] == RankSchedule(1, RANK, 1.0, 1.0)
    sized = {**ANIMA, "ss_network_dim": "8", "ss_tlora_alpha_rank_scale": "0.5"}
    assert schedule_of(pipe, path, sized)[0] == RankSchedule(1, 8, 0.5, 1.0)
    known = schedule_of(pipe, path, {"ss_adapter": "tlora", "ss_tlora_min_rank": "2"})[0]
    assert known is not None
    assert known == RankSchedule(2, RANK, 1.0, 1000, whole=True)
    assert known.at(500.9, 1000) == known.at(500.0, 1000) == 3
    assert schedule_of(pipe, path, {"ss_network_module": "networks.lora"}) == (None, "1 unet layers, rank 4")


UNKNOWN = [
    {"ss_network_module": "networks.tlora_flux"},
    {"ss_tlora_min_rank": "1", "ss_tlora_rank_schedule": "cosine"},
    {**ANIMA, "ss_tlora_min_rank": "99"},
    {**ANIMA, "ss_tlora_min_rank": "nan"},
    {**ANIMA, "ss_tlora_max_timestep": "0"},
]


@pytest.mark.parametrize("metadata", UNKNOWN)
def test_a_schedule_that_is_not_known_is_a_warning(pipe: Any, tmp_path: Path, metadata: dict[str, str]) -> None:
    schedule, report = schedule_of(pipe, tmp_path / "it.safetensors", metadata)
    assert schedule is None
    assert "a T-LoRA, trained with fewer ranks where there is more noise; here all of them act in every step" in report


def test_a_text_conditioner_that_runs_once_is_a_warning(pipe: Any, tmp_path: Path) -> None:
    schedule, _ = schedule_of(pipe, tmp_path / "it.safetensors", ANIMA)
    file = read_lora(tmp_path / "it.safetensors")
    found, notes = rank_schedule(file, by_layer(file).layers, True)
    assert found == schedule
    assert "its text conditioner runs once" in notes[0]


def test_states_of_early_files_are_no_damage_but_a_warning(pipe: Any, tmp_path: Path) -> None:
    states = {f"tlora_{name}_state": torch.tensor(1) for name in ("min_rank", "rank_schedule")}
    schedule, report = schedule_of(pipe, tmp_path / "it.safetensors", {}, **states)
    assert schedule is None
    assert "all of them act in every step" in report


class Masked:
    """Adds the change of the first ranks to layers of a plain model, as many as act at its timestep."""

    def __init__(self, unet: Any, changes: dict[str, list[Tensor]], at: Callable[[float], int]) -> None:
        self.ranks: list[int] = []
        self._at = at
        self._changes = changes
        unet.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name in changes:
            unet.get_submodule(name).register_forward_hook(lambda *given, name=name: self._add(name, *given))

    def _begin(self, _unet: nn.Module, given: tuple[Any, ...], _options: dict[str, Any]) -> None:
        self.ranks.append(self._at(float(given[1])))

    def _add(self, name: str, layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        change = torch.stack(self._changes[name][: self.ranks[-1]]).sum(dim=0)
        if isinstance(layer, nn.Conv2d):
            return out + F.conv2d(inputs[0], change, None, layer.stride, layer.padding, layer.dilation)
        return out + F.linear(inputs[0], change)


def latents_of(pipe: Any, concepts: Any, method: Any = None, steps: int = 5) -> Tensor:
    return pipe(
        PROMPT, concepts=concepts, method=method, num_inference_steps=steps, output_type="latent", width=32, height=32,
        generator=seeded(),
    ).images  # fmt: skip


@pytest.mark.parametrize("vectors", [False, True])
def test_a_call_equals_dense_changes_of_as_many_ranks_in_each_step(pipe: Any, tmp_path: Path, vectors: bool) -> None:
    names = LINEAR, CONVOLUTION
    if vectors:
        tensors, changes = begun_at_vectors(pipe, names)
        save_file(tensors, tmp_path / "it.safetensors", ANIMA)
    else:
        lora = {name: it for name, it in random_lora(pipe.unet, 1, rank=RANK, targets=names).items() if name in names}
        save_lora(tmp_path / "it.safetensors", ANIMA, unet=lora)
        changes = {
            name: [LoraFactors(it.down[i : i + 1], it.up[:, i : i + 1]).delta() for i in range(RANK)]
            for name, it in lora.items()
        }
    pipe.load_concept(tmp_path / "it.safetensors", "cat", trigger="cat")
    found = latents_of(pipe, ["cat"], "merge")
    masked = Masked(pipe.unet, changes, lambda t: int((1.0 - t / 1000) * (RANK - 1)) + 1)
    expected = latents_of(pipe, None)
    assert masked.ranks == sorted(masked.ranks)
    assert len(set(masked.ranks)) > 2
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("method", slow_but(["merge", "tara"], ["merge", "regional", "tara", "draft"]))
def test_with_every_gate_it_equals_a_lora_of_the_ranks_that_act(pipe: Any, tmp_path: Path, method: str) -> None:
    lora, other = random_lora(pipe.unet, 1, rank=RANK), random_lora(pipe.unet, 2)
    early = {**ANIMA, "ss_tlora_min_rank": "2", "ss_tlora_max_timestep": "0.0001"}
    cut = {name: LoraFactors(it.down[:2], it.up[:, :2].contiguous()) for name, it in lora.items()}
    for name, metadata, factors in (("all", {}, lora), ("masked", early, lora), ("cut", {}, cut), ("dog", {}, other)):
        save_lora(tmp_path / f"{name}.safetensors", metadata, unet=factors)
    left, right = (0, 0, 16, 32), (16, 0, 32, 32)
    dog = Concept(
        name="dog", lora=str(tmp_path / "dog.safetensors"), trigger="zwx", class_word="dog", region=right, weight=0.7
    )
    found = {
        name: latents_of(
            pipe,
            [Concept(name="cat", lora=str(tmp_path / f"{name}.safetensors"), trigger="sks", class_word="cat",
                     region=left), dog],
            method, 3,
        )
        for name in ("masked", "cut", "all")
    }  # fmt: skip
    torch.testing.assert_close(found["masked"], found["cut"], rtol=1e-4, atol=1e-5)
    assert relative_error(found["masked"], found["all"]) > 1e-3


def test_two_subjects_of_one_file_have_its_ranks(pipe: Any, tmp_path: Path) -> None:
    early = {**ANIMA, "ss_tlora_max_timestep": "0.0001"}
    lora = random_lora(pipe.unet, 1, rank=RANK)
    cut = {name: LoraFactors(it.down[:1], it.up[:, :1].contiguous()) for name, it in lora.items()}
    save_lora(tmp_path / "masked.safetensors", early, unet=lora)
    save_lora(tmp_path / "cut.safetensors", unet=cut)
    found = []
    for name in ("masked", "cut"):
        regions = {"cat": (0, 0, 16, 32), "dog": (16, 0, 32, 32)}
        concepts = [
            Concept(name=word, lora=str(tmp_path / f"{name}.safetensors"), trigger=word, region=region)
            for word, region in regions.items()
        ]
        found.append(latents_of(pipe, concepts, "regional", 2))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_where_ranks_do_not_follow_the_noise_it_is_said(pipe: Any, tmp_path: Path, caplog: Any) -> None:
    for seed, (name, metadata) in enumerate({"cat": ANIMA, "dog": {}}.items()):
        save_lora(tmp_path / f"{name}.safetensors", metadata, unet=random_lora(pipe.unet, seed))
    paths = [tmp_path / f"{name}.safetensors" for name in ("cat", "dog")]
    pipe.load_concept(paths, "both", trigger="both")
    assert "cat.safetensors: it is a T-LoRA, trained with fewer ranks" in caplog.text
    notes = match_files([Given(path.stem, read_lora(path), 1.0) for path in paths], pipe).notes
    assert next(note for note in notes if "T-LoRA" in note).startswith("cat: it is a T-LoRA")
