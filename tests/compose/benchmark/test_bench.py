"""The costs of methods, as the command prints them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux3Transformer2DModel
from diffusers.models.modeling_utils import get_parameter_dtype

from commands import call
from components import tiny_pipeline
from flux import flux_pipeline
from flux3 import default_flux3
from lora_compose.attention import backbone_of, reference_factor
from lora_compose.attention.backbones.flux2 import Flux2Backbone
from lora_compose.attention.backbones.flux3 import Flux3Backbone
from lora_compose.compose.benchmark import bench as bench_module
from lora_compose.compose.benchmark import many_loaded, timing
from lora_compose.compose.benchmark.architectures import (
    PROMPT,
    SD15,
    as_called,
    attention_lora,
    columns,
    with_lora,
    without_boxes,
    without_weights,
)
from lora_compose.compose.benchmark.counting import meta_unet
from lora_compose.compose.benchmark.structures import pipeline_of, scheduler
from lora_compose.compose.benchmark.timing import PEFT_WAYS, Job, open_with_concepts, peak_bytes, time_rows, time_ways
from lora_compose.compose.benchmark.transformers import REGION_TOKENS, block_lora, pass_cost
from lora_compose.pipelines.calls.resolved_call import find_in
from lora_compose.pipelines.families import ComposeFlux3DistilledPipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import METHODS, Regional, make_method

pytestmark = pytest.mark.usefixtures("tensors_of_others_do_not_count")


def bench(*arguments: object, code: int = 0) -> str:
    return call("bench", *arguments, code=code).output


def cells(output: str) -> dict[tuple[str, str], list[str]]:
    """The rows of a table by method and number of concepts."""
    rows = [line.split() for line in output.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) > 3 and row[1].isdigit()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_counting_is_the_default(tmp_path, monkeypatch):
    small = {**SD15, "layers_per_block": 1}  # the large ones take seconds
    monkeypatch.setattr(bench_module, "ARCHITECTURES", {"SD 1.5": small, "SDXL": small})
    output = bench("--method", "composite", "-n", 2, "--steps", 3, "--json", tmp_path / "it.json")
    rows = cells(output)
    assert rows["plain", "0"] == ["6", "-", "-", "1.000", "-", "1.000", "-"]
    assert rows["composite", "2"][0] == "12"
    written = json.loads((tmp_path / "it.json").read_text())
    assert (written["steps"], len(written["counted"])) == (3, 2)
    for row in written["counted"]:
        ratio = row["cost"]["flops"] / row["plain"]["flops"]
        preparation = 3 * row["cost"]["preparation_flops"] / row["plain"]["flops"]
        at = 3 if row["architecture"] == "SD 1.5" else 5
        assert rows[row["method"], "2"][at : at + 2] == [f"{ratio:.3f}", f"{preparation:.3f}"]
        assert ratio == pytest.approx(2, rel=0.02)


@pytest.mark.slow
def test_seconds_and_memory_of_a_model_without_files_of_loras(model, tmp_path):
    output = bench(
        "--time", "--model", model, "--method", "regional", "-n", 2, "--steps", 2, "--pairs", 2,
        "--save-memory", "tiling", "--json", tmp_path / "it.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "it.json").read_text())
    assert "counted" not in written
    assert written["save_memory"] == ["tiling"]
    assert "tiling" in output
    row, *peft = written["timed"]
    assert [(one["method"], one["concepts"]) for one in peft] == [("set_adapters", 2), ("fuse_lora", 2)]
    time = row["time"]
    assert 0 < time["preparation_seconds"] < time["seconds"]
    assert time["ratio_min"] <= time["ratio"] <= time["ratio_max"]
    parameters = sum(p.numel() for p in tiny_pipeline().unet.parameters())
    assert row["peak_bytes"] > row["plain_peak_bytes"] > 4 * parameters
    assert cells(output)["regional", "2"][-1] == f"{row['peak_bytes'] / row['plain_peak_bytes']:.3f}"


def test_concepts_have_boxes_only_where_a_method_needs_them():
    unet = meta_unet(SD15)
    pipe = pipeline_of(unet, scheduler())
    every = with_lora(without_boxes(columns(2, 512, 512)), attention_lora(unet))
    pipe.library.loaded.update({loaded.concept.name: loaded for loaded in every})
    boxed = {name for name in METHODS if as_called(pipe, make_method(name), 2, 512, 512)[0].region}
    assert {"regional", "lora-composer"} <= boxed
    assert not boxed & {"draft", "clora", "tara", "merge", "freefuse"}


@pytest.mark.slow
def test_with_a_box_for_each_concept_draft_costs_what_regional_costs():
    output = bench("--method", "draft", "--method", "regional", "-n", 2, "--steps", 2, "--boxes")
    assert "Every concept has a box" in " ".join(output.split())
    assert cells(output)["draft", "2"] == cells(output)["regional", "2"]
    assert "give --count with it" in bench("--boxes", "--memory", code=2)
    told = bench("--memory", "--model", "elsewhere", "--size", 64, code=2)
    assert "--model, --size: for real calls; give --time, --calls or --swap with it" in told


def test_progress_of_timing_ends_where_the_work_ends(model, monkeypatch):
    seen: list[float] = []

    @contextmanager
    def watched(text: str, total: float) -> Iterator[Any]:
        yield lambda done, text=None: seen.append(done / total)

    monkeypatch.setattr(timing, "bar", watched)
    monkeypatch.setattr(timing, "PEFT_WAYS", ())
    time_rows(["merge"], [1, 2], Job(str(model), "cpu", 1), 1, peaks=False)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert max(later - earlier for earlier, later in pairwise(seen)) == pytest.approx(1 / 8)  # a call each


def test_saving_memory_is_refused_where_nothing_would_save_any():
    assert "give --time with it" in bench("--memory", "--save-memory", "tiling", code=2)
    assert "accelerator" in bench("--time", "--save-memory", "model-offload", code=2)


class Watched(ComposeStableDiffusionPipeline):
    """Writes down which calls there were, and whether adapters of PEFT are beside or in the weights."""

    calls: tuple[Any, ...] = ()

    @wraps(ComposeStableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        merged = {name for module in self.unet.modules() for name in getattr(module, "merged_adapters", ())}
        Watched.calls += ((kwargs.get("method"), tuple(self.get_active_adapters()), tuple(sorted(merged))),)
        return super().__call__(*args, **kwargs)


def test_runs_are_interleaved(model):
    pipe = open_with_concepts(Job(str(model), "cpu", 1, concepts=2))
    watched = Watched(**pipe.components, requires_safety_checker=False)
    watched.set_progress_bar_config(disable=True)
    watched.library.loaded.update(pipe.library.loaded)
    jobs = [Job(str(model), "cpu", 1, method=name, concepts=2) for name in ("regional", *PEFT_WAYS)]
    timed = time_ways(watched, jobs, rounds=1)
    both = ("adapter0", "adapter1")
    one_round = (None, (), ()), (Regional(), (), ()), (None, both, ()), (None, both, both)
    planned, *calls = Watched.calls  # a class that overrides the call is planned through it
    assert planned == one_round[1]
    assert tuple(calls) == one_round * 2  # the first warms up
    assert all(one.ratio_min <= one.ratio <= one.ratio_max for one in timed)
    assert [one.change_seconds > 0 for one in timed] == [False, True, True]
    assert not watched.get_list_adapters()


@pytest.mark.parametrize(
    ("pipeline", "arguments"),
    [
        (flux_pipeline, {"guidance_scale": 5.0}),
        (partial(flux_pipeline, guidance_embeds=False), {"true_cfg_scale": 5.0, "negative_prompt": ""}),
        pytest.param(partial(default_flux3, ComposeFlux3DistilledPipeline, flow_map=True), {}, marks=pytest.mark.slow),
    ],
    ids=["distilled guidance", "classifier-free guidance", "no guidance"],
)
def test_transformers_are_timed_with_the_guidance_that_they_have(pipeline, arguments, tmp_path, monkeypatch):
    pipeline().save_pretrained(tmp_path)
    seen: list[dict[str, Any]] = []

    def watched(pipe: Any, job: Job, given: dict[str, Any], *options: str) -> Any:
        seen.append(given)
        return real(pipe, job, given, *options)

    real = timing.call
    monkeypatch.setattr(timing, "call", watched)
    job = Job(str(tmp_path), "cpu", 1, method="regional", concepts=2, size=64)
    pipe = open_with_concepts(job)
    ours, theirs = time_ways(pipe, [job, replace(job, method="fuse_lora")], rounds=1)
    assert seen[0] == {"width": 64, "height": 64, **arguments}
    assert 0 < ours.preparation_seconds < ours.seconds
    assert theirs.change_seconds > 0


def test_every_concept_has_a_word_and_a_column(model):
    pipe = open_with_concepts(Job(str(model), "cpu", 1, concepts=13))
    concepts = columns(13, 130, 64)
    assert [concept.region for concept in concepts[:2]] == [(0, 0, 10, 64), (10, 0, 20, 64)]
    assert concepts[-1].region == (120, 0, 130, 64)
    found = find_in(pipe.tokenizers_for([]), concepts, [[PROMPT]])
    assert found.trigger.shape == (1, 32, 13)
    assert found.trigger.sum(dim=1).tolist() == [[1.0] * 13]
    assert found.phrase.sum(dim=1).tolist() == [[2.0] * 13]  # and a class word
    assert pipe.resolve_concepts(concepts)[12].factors.model.keys() == attention_lora(pipe.unet).keys()


@pytest.mark.slow
def test_requests_of_a_transformer_swap_concepts_too(tmp_path):
    bench(
        "--swap",
        "--model",
        "playground-flux",
        "--size",
        64,
        "--loaded",
        5,
        "--pairs",
        1,
        "--json",
        tmp_path / "it.json",
    )
    found = json.loads((tmp_path / "it.json").read_text())["requests"]
    assert [one["way"] for one in found["ways"]] == ["set_adapters", "regional", "merge"]
    assert all(one["passes"] > 0 for one in found["ways"])


@pytest.mark.slow
def test_swapping_concepts_in_memory_is_much_faster_than_reading_them(model, tmp_path):
    given = ("--swap", "--model", model, "--loaded", 6, "--pairs", 1)
    output = bench(*given, "--json", tmp_path / "it.json")
    swaps = json.loads((tmp_path / "it.json").read_text())["swaps"]
    assert 0 < swaps["swapping"] < swaps["reading"] / 10
    assert 0 < swaps["installing_again"] < swaps["installing"]
    assert 16 < swaps["file_bytes"] / 2**20 < 17
    (row,) = (line for line in output.splitlines() if "used again" in line)
    assert row.split()[-1] == f"{swaps['swapping']:.2f}"
    found = json.loads((tmp_path / "it.json").read_text())["requests"]
    assert (found["loaded"], found["active"], found["requests"]) == (6, 5, 1)
    for one in found["ways"]:
        *_, row = (line.split() for line in output.splitlines() if line.split()[:1] == [one["way"]])  # below its title
        assert (row[2], row[-1]) == (f"{one['cpu']:.1f}", f"{one['times']:.2f}")


def test_requests_have_the_same_loras_by_each_way_and_loading_looks_through_the_model_a_few_times_for_each(
    model, monkeypatch
):
    """And not for each of its tensors; the LoRAs are others in each request."""
    looks: list[None] = []

    def looked(module: Any) -> torch.dtype:
        looks.append(None)
        return get_parameter_dtype(module)

    monkeypatch.setattr("diffusers.models.modeling_utils.get_parameter_dtype", looked)
    seen: list[tuple[str, list[str], bool]] = []

    def watched(pipe: Any, job: Job, arguments: dict[str, Any]) -> Any:
        names = [concept.name for concept in arguments.get("concepts", ())] or list(pipe.get_active_adapters())
        ours = isinstance(pipe, ComposeStableDiffusionPipeline)
        seen.append((str(arguments.get("method")), sorted(names), ours))
        return timing.call(pipe, job, arguments)

    monkeypatch.setattr(many_loaded, "call", watched)
    found = many_loaded.measure_requests(Job(str(model), "cpu", 1), 6, 1)
    with_six = len(looks)
    warm, timed = seen[:4], seen[4:]
    for requests, numbers in ((warm, (0, 1, 2, 3, 4)), (timed, (0, 1, 2, 3, 5))):
        five = [f"lora{number}" for number in numbers]
        assert requests == [
            ("None", [], True), ("None", five, False), ("regional", five, True), ("merge", five, True),
        ]  # fmt: skip
    peft = found.ways[0]
    assert 0 < peft.changing_cpu < peft.cpu
    with pytest.raises(ValueError, match="at least 5"):
        many_loaded.measure_requests(Job(str(model), "cpu", 1), 4, 1)
    looks.clear()
    many_loaded.measure_requests(Job(str(model), "cpu", 1), 8, 1)
    assert len(looks) - with_six <= 2 * 3


@pytest.mark.slow
def test_a_failure_in_the_other_process_is_reported():
    with pytest.raises(ChildProcessError, match="there is no model 'nowhere'"):
        peak_bytes(Job("nowhere", "cpu", 1))


def test_wrong_options_end_with_2():
    assert "unknown method 'blend'" in bench("--method", "blend", code=2)
    bench("-n", 0, code=2)
    bench("-n", 27, code=2)
    bench("--steps", 0, code=2)


@pytest.mark.slow
def test_a_later_call_needs_far_less_of_the_host_than_the_first(model, tmp_path):
    given = ("--calls", "--model", model, "--method", "merge", "-n", 2, "--json", tmp_path / "it.json")
    row = cells(bench(*given))["merge", "2"]
    (found,) = json.loads((tmp_path / "it.json").read_text())["calls"]
    work = found["work"]
    counts = [[str(one) for one in work[when].values()] for when in ("first", "again", "step")]
    times = [[f"{work[when]:.1f}"] for when in ("first_ms", "again_ms")]
    assert row == counts[0] + times[0] + counts[1] + times[1] + counts[2]
    assert work["again_ms"] < work["first_ms"]
    assert work["again"]["python_calls"] < 0.8 * work["first"]["python_calls"]
    assert work["again"]["operations"] < work["first"]["operations"]
    assert work["step"]["operations"] <= 0  # keys and values of the text are kept


def test_a_pass_of_a_transformer_costs_two_thin_products_per_layer_more_and_attends_by_regions():
    model = without_weights("FLUX.2-klein 4B").transformer
    text, cells, rank, concepts = 64, 256, 8, 2
    tokens = text + concepts * REGION_TOKENS
    plain, same = (pass_cost(model, 0, rank, (32, 32), length) for length in (text, tokens))
    found = pass_cost(model, concepts, rank, (32, 32), text)

    lora = block_lora(model, rank)
    sees = {("text",): tokens, ("image",): cells, ("text", "image"): cells + tokens}
    thin = sum(
        2 * sees[backbone_of(model).sites[name].parts] * rank * (factors.down.shape[1] + factors.up.shape[0])
        for name, factors in lora.items()
    )
    half = cells // concepts  # of the cells are in each region; they attend to two texts of the three
    pairs = text * (text + cells) + concepts * REGION_TOKENS * (REGION_TOKENS + half)
    pairs += cells * (text + REGION_TOKENS + cells)
    width, layers = 24 * 128, 5 + 20
    unseen = 4 * layers * width * ((cells + tokens) ** 2 - pairs)
    assert found.flops == same.flops + concepts * thin - unseen

    weights = sum(parameter.nbytes for parameter in model.parameters())
    factors = sum(one.down.nbytes + one.up.nbytes for one in lora.values())
    assert found.peak_bytes > plain.peak_bytes + concepts * factors > weights
    away = [
        sum(p.nbytes for name, p in model.named_parameters() if f"transformer_blocks.{i}." in name) for i in range(20)
    ]
    single = model.single_transformer_blocks[0]
    assert found.offloaded_bytes == found.peak_bytes - sum(away) + max(
        sum(p.nbytes for p in block.parameters()) for block in (single, model.transformer_blocks[0])
    )


def test_a_pass_with_reference_images_costs_what_its_tokens_cost():
    model = without_weights("FLUX.2-klein 4B").transformer
    plain, found = (pass_cost(model, 0, 8, (32, 32), 64, references=number) for number in (0, 2))
    backbone = Flux2Backbone(model, reference=True, cells=2 * 16 * 16)
    assert found.flops / plain.flops == pytest.approx(reference_factor(backbone, (32, 32), 64))
    assert found.peak_bytes > plain.peak_bytes
    both = pass_cost(model, 2, 8, (32, 32), 64, references=2)
    assert 1 < both.flops / found.flops < 1.2


def test_a_pass_with_reference_images_costs_less_where_they_have_blocks_of_their_own():
    """Only the blocks of FLUX.3 that text and images share attend to all of them."""
    with torch.device("meta"):
        model = Flux3Transformer2DModel(num_layers=2, num_single_layers=2, num_attention_heads=4)
    plain, found = (pass_cost(model, 0, 8, (32, 32), 64, references=number) for number in (0, 2))
    factor = reference_factor(Flux3Backbone(model, reference=True, cells=2 * 16 * 16), (32, 32), 64)
    assert found.flops / plain.flops == pytest.approx(factor, rel=1e-3)
    assert pass_cost(model, 2, 8, (32, 32), 64, references=2).flops > found.flops
