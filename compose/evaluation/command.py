"""`lora-compose evaluate`: runs a suite in one process or several, and writes its report."""

from pathlib import Path

from lora_compose.compose.evaluation.comparison import compare_runs
from lora_compose.compose.evaluation.planning import make_plan
from lora_compose.compose.evaluation.report import write_report
from lora_compose.compose.evaluation.results import CLAIMS, is_done
from lora_compose.compose.evaluation.runner import evaluate
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.generate.processes import default_number, launch, local_rank
from lora_compose.compose.support.terminal import FAILED, bar, echo, err, out


def run_suite(suite: str, folder: Path | None = None, processes: int | None = None, ray: str | None = None) -> int:
    """Generates and scores all images of a suite, writes the report, and returns the exit code; a rerun resumes.

    Further processes join in. The suite is a file or the name of a shipped one; `processes` are one per GPU by default,
    or as in the suite, and with a Ray cluster (`ray`: its address, or "local") one per node if there are no GPUs.

    Raises:
        ValueError: For suites that cannot be read.
        OSError: If all processes were killed.
    """
    loaded = read_suite(suite)
    to = folder or Path("outputs/evaluation") / loaded.name
    if local_rank():
        evaluate(loaded, to)  # only the first process of the machine prints
        return 0
    plan = make_plan(loaded)
    echo(f"{loaded.name}: {len(plan.batches)} batches of {loaded.batch_size} images, in {to}", to=err)

    def done() -> int:
        return sum(is_done(to, planned) for planned in plan.batches)

    with bar("evaluating", len(plan.batches)) as on_progress:
        if ray is not None:
            from lora_compose.compose.evaluation.on_ray import evaluate_on_ray

            evaluate_on_ray(loaded, to, ray, on_progress, workers=processes)
        elif (number := processes or default_number(loaded.processes, loaded.device)) > 1:
            work = ["evaluate", "work", suite, "--out", str(to)]
            code = launch(work, number, loaded.threads or 1, lambda: on_progress(done()))
            if code and done() < len(plan.batches):
                return code
        else:
            evaluate(loaded, to, on_progress)
    with Claims(to / CLAIMS).claim("report") as claim:
        if claim is None:
            echo(f"Another process of this evaluation writes the report, in {to}.")
        else:
            show_report(to)
    if left := len(plan.batches) - done():
        echo(f"{left} batches failed; the report lists why. The same command retries them.", style="red", to=err)
    return FAILED if left else 0


def work_on(suite: str, folder: Path) -> None:
    """Takes part in an evaluation, without a report."""
    evaluate(read_suite(suite), folder)


def compare_folders(first: Path, second: Path) -> None:
    """Compares two evaluations and shows the differences."""
    out.print(compare_runs(first, second))


def show_report(folder: Path, baseline: str | None = None) -> None:
    """Writes the report of an evaluation and prints its path."""
    written = write_report(folder, baseline)
    echo(f"The report: {written.html}", style="bold")
    echo(f"As a table: {written.markdown}; for pandas: {written.images}, {written.concepts}, {written.summary}")
