"""`lora-compose evaluate`: runs a suite in one process or several, and writes its report."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lora_compose.compose.cluster.opening import Cluster
from lora_compose.compose.cluster.work import Failure, attempt
from lora_compose.compose.evaluation.alone import Alone, missing_references, with_references
from lora_compose.compose.evaluation.batches import Batch, batches
from lora_compose.compose.evaluation.chosen import chosen
from lora_compose.compose.evaluation.comparison import compare_runs
from lora_compose.compose.evaluation.planning import plan_batches
from lora_compose.compose.evaluation.published import fetch, gib, show_published, write_suite
from lora_compose.compose.evaluation.report import write_report
from lora_compose.compose.evaluation.results import PLAN, is_done
from lora_compose.compose.evaluation.runner import check_early_each, evaluate
from lora_compose.compose.evaluation.scoring import check_chosen
from lora_compose.compose.evaluation.suite import Suite, read_suite
from lora_compose.compose.evaluation.trained import tried_loras, with_loras
from lora_compose.compose.evaluation.worker import Images, Worker
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.generate.processes import default_number, launch, local_rank, own_device
from lora_compose.compose.support.terminal import FAILED, bar, echo, err, out


def run_suite(
    suite: str,
    folder: Path | None = None,
    processes: int | None = None,
    ray: str | None = None,
    metrics: Sequence[str] = (),
) -> int:
    """Generates and scores all images of a suite, writes the report, and returns the exit code; a rerun resumes.

    Further processes join in. The suite is a file or the name of a shipped one; `processes` are one per GPU by default,
    or as in the suite, and with a Ray cluster (`ray`: its address, or "local") one per node if there are no GPUs.
    `metrics` are the names of further metrics, instead of those of the suite, as `chosen` takes them. Raises ValueError
    for suites that cannot be read, and metrics whose models are not there, and OSError if all processes were killed.
    """
    loaded = _read(suite, metrics)
    to = folder or Path("outputs/evaluation") / loaded.name
    if local_rank():
        evaluate(loaded, to)  # only the first process of the machine prints
        return 0
    check_chosen(loaded)
    plan = plan_batches(loaded)
    echo(f"{loaded.name}: {len(plan.batches)} batches of {loaded.batch_size} images, in {to}", to=err)

    def done() -> int:
        return sum(is_done(to, planned) for planned in plan.batches)

    with bar("evaluating", len(plan.batches)) as on_progress:
        number = processes or default_number(loaded.processes, loaded.device)
        if ray is None and number > 1:
            work = ["evaluate", "work", suite, "--out", str(to), *(f"--metrics={name}" for name in metrics)]
            code = launch(work, number, loaded.threads or 1, lambda: on_progress(done()))
            if code and done() < len(plan.batches):
                return code
        else:
            cluster = None if ray is None else Cluster(ray, processes)
            evaluate(loaded, to, on_progress, cluster=cluster)
    show_report(to)  # each process that was started by hand writes it: of the same results, they write the same files
    if left := len(plan.batches) - done():
        echo(f"{left} batches failed; the report lists why. The same command retries them.", style="red", to=err)
    return FAILED if left else 0


def run_published(
    path: Path, folder: Path | None = None, processes: int | None = None, ray: str | None = None, *, smoke: bool = False
) -> int:
    """Shows what a published suite downloads, downloads it, makes two images, shows the cost, and then runs it.

    LoRAs that are trained for it are tried for a few steps before the two images, after which `smoke` stops, and
    trained after the cost. `folder` is for the results; the rest is as for `run_suite`. Raises ValueError for suites
    that cannot be read, or whose images cannot be made, and OSError if the hub does not give what is needed.
    """
    published, to = show_published(path, folder)
    fetched = fetch(published)
    if smoke or not (to / PLAN).exists():
        _try_out(tried_loras(fetched.suite, fetched.trainings, to), published.references, to)
    if smoke:
        return 0
    suite = with_loras(fetched.suite, fetched.trainings, to)
    write_suite(with_references(suite, published.references, to), to / "suite.yaml")
    return run_suite(str(to / "suite.yaml"), to, processes, ray)


def _try_out(suite: Suite, alone: Mapping[str, Alone], out: Path) -> None:
    """Makes two images, of the baseline and of another method, and shows what all cost; ValueError if it cannot.

    They are scored if all references are there. Those that LoRAs make alone (`alone`) are counted, and not made.
    """
    every = list(batches(suite))
    check_early_each(suite, every)
    later = {concept.name for concept in suite.concepts if concept.references in alone}
    worker = Worker.open(_without_references(suite, later), own_device(suite.device))
    flops, seconds = 0, 0.0
    for batch in _two(suite):
        for result in attempt(worker.do, batch):
            if isinstance(result, Images):
                (made, *_), cost = result.made, result.cost
                path = out / "smoke" / f"{batch.arm.name}.png"
                write_whole(path, png_bytes(made.image, made.record))
                memory = "" if cost.peak_bytes is None else f", {gib(cost.peak_bytes)}"
                echo(f"  {batch.arm.name}: {cost.seconds:.1f} s{memory}: {path}")
                flops, seconds = flops + cost.flops, seconds + cost.seconds
                if later:
                    break
            elif isinstance(result, Failure):
                raise ValueError(f"scene {batch.scene.name!r}, {batch.arm.name}: {result.error}")
    images, further = sum(len(batch.seeds) for batch in every), sum(missing_references(suite, alone, out).values())
    whole = sum(_counted(worker, batch) * len(batch.seeds) for batch in every)
    whole += further * _counted(worker, next(batch for batch in every if batch.arm.alone))
    what = f"{images} images" + (f" and {further} references" if further else "")
    echo(f"{what}, {whole:.3g} FLOPs: about {seconds * whole / flops / 3600:.2g} h at this pace")
    if any(method.merge for method in suite.compared):
        echo("  Merging LoRAs into one file is not in it.")


def _counted(worker: Worker, batch: Batch) -> int:
    """FLOPs of an image of a batch; raises ValueError, with the scene, if it cannot be planned."""
    try:
        return worker.count(batch).flops
    except ValueError as error:
        raise ValueError(f"scene {batch.scene.name!r}, {batch.arm.name}: {error}") from error


def _without_references(suite: Suite, names: Collection[str]) -> Suite:
    """The suite with no references of some concepts: it can be opened, and images of these cannot be scored."""
    concepts = [it.model_copy(update={"references": ()}) if it.name in names else it for it in suite.concepts]
    return suite.model_copy(update={"concepts": tuple(concepts)})


def _two(suite: Suite) -> Sequence[Batch]:
    small = suite.model_copy(update={"scenes": suite.scenes[:1], "seeds": suite.seeds[:1]})
    methods = [batch for batch in batches(small) if batch.arm.method is not None]
    baseline = [batch for batch in methods if batch.arm.name == suite.baseline]
    return [*baseline, *(batch for batch in methods if batch.arm.name != suite.baseline)][:2]


def work_on(suite: str, folder: Path, metrics: Sequence[str] = ()) -> None:
    """Takes part in an evaluation, without a report."""
    evaluate(_read(suite, metrics), folder)


def _read(suite: str, metrics: Sequence[str]) -> Suite:
    loaded = read_suite(suite)
    return loaded.model_copy(update={"metrics": chosen(metrics)}) if metrics else loaded


def compare_folders(first: Path, second: Path) -> None:
    """Compares two evaluations and shows the differences."""
    out.print(compare_runs(first, second))


def show_report(folder: Path, baseline: str | None = None) -> None:
    """Writes the report of an evaluation and prints its path."""
    written = write_report(folder, baseline)
    echo(f"The report: {written.html}", style="bold")
    tables = (written.images, written.concepts, written.confusion, written.summary)
    echo(f"As a table: {written.markdown}; for pandas: {', '.join(map(str, tables))}")
