"""Seconds and memory of real calls: of methods, and of PEFT's two ways to have several LoRAs in a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from lora_compose.compose.benchmark.tables import MIB, new_table
from lora_compose.compose.benchmark.timing import (
    PEFT_WAYS,
    Job,
    Timed,
    open_with_concepts,
    peak_bytes,
    time_ways,
)
from lora_compose.compose.support.terminal import bar


@dataclass(frozen=True)
class TimedRow:
    """Seconds and memory of a method, or of one of `PEFT_WAYS`, and the plain pipeline's memory."""

    method: str
    concepts: int
    time: Timed
    peak_bytes: int | None
    plain_peak_bytes: int | None


def time_rows(
    methods: Sequence[str], concepts: Sequence[int], plain: Job, rounds: int, *, peaks: bool = True
) -> list[TimedRow]:
    """Times methods with so many concepts in this process, then measures the memory of each in a process of its own.

    In every round the plain pipeline, all methods and PEFT make one image each, one after the other.
    """
    jobs = {n: [replace(plain, method=name, concepts=n) for name in (*methods, *PEFT_WAYS)] for n in concepts}
    each, times, memory, done = [job for some in jobs.values() for job in some], [], [], 0
    calls = (1 + rounds) * (len(concepts) + len(each))
    pipe = open_with_concepts(replace(plain, concepts=max(concepts)))
    with bar("measuring", calls + (1 + len(each) if peaks else 0)) as on_progress:

        def count(text: str | None = None) -> None:
            nonlocal done
            done += text is None
            on_progress(done, text)

        for number, some in jobs.items():
            count(f"timing {number} concepts")
            times += time_ways(pipe, some, rounds, count)
        del pipe
        for job in (plain, *each) if peaks else ():
            count(f"memory of {job.method or 'plain'} with {job.concepts} concepts")
            memory.append(peak_bytes(job))
            count()
    plain_memory, *memory = memory or [None] * (1 + len(each))
    return [
        TimedRow(job.method or "", job.concepts, time, peak, plain_memory)
        for job, time, peak in zip(each, times, memory, strict=True)
    ]


def times_table(rows: Sequence[TimedRow], what: str) -> Table:
    """Seconds of whole calls and the peak of the memory, as ratios to the plain pipeline."""
    table = new_table(
        f"Measured: {what}; seconds of whole calls without decoding, of those before the first step, and beside them "
        "to load and remove LoRAs; ratio to the plain pipeline round by round; peak of the memory, model included. "
        "set_adapters and fuse_lora are plain diffusers with PEFT",
        ["method", "N", "s", "before", "beside", "ratio", "min..max", "MiB", "ratio"],
    )
    plain = rows[0].plain_peak_bytes
    table.add_row("plain", "0", *"-----", *_peak(plain, plain))
    for row in rows:
        time = row.time
        table.add_row(
            row.method, str(row.concepts), f"{time.seconds:.2f}", f"{time.preparation_seconds:.2f}",
            f"{time.change_seconds:.2f}", f"{time.ratio:.3f}",
            f"{time.ratio_min:.2f}..{time.ratio_max:.2f}", *_peak(row.peak_bytes, plain),
        )  # fmt: skip
    return table


def _peak(peak: int | None, plain: int | None) -> tuple[str, str]:
    """MiB, and the ratio to the plain pipeline."""
    return ("-", "-") if peak is None or plain is None else (f"{peak / MIB:.0f}", f"{peak / plain:.3f}")
