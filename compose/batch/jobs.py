"""The calls of a batch, with keys that change with everything that their images depend on."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_compose.compose.batch.entries import Entry, InvalidEntry
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.facts import digest, model_facts, run_facts
from lora_compose.pipelines.scene.scene import Run


@dataclass(frozen=True)
class Job:
    """Images of one scene that are made in one call.

    `key` is a hash of everything that they depend on, `scene_key` of all but the seeds; the seed of `run` is not used.
    """

    entry: Entry
    run: Run
    seeds: tuple[int, ...]
    scene_key: str
    key: str

    @property
    def name(self) -> str:
        """The job's name, unique in the batch."""
        return f"{self.entry.name}-{self.seeds[0]}"


def make_jobs(entries: Iterable[Entry], settings: BatchSettings) -> tuple[list[Job], list[InvalidEntry]]:
    """The calls of a batch, and scenes whose files are missing; raises ValueError if there is no such model."""
    model = model_facts(model_source(settings.model), settings.model)
    jobs: list[Job] = []
    bad: list[InvalidEntry] = []
    for entry in entries:
        run = settings.run(entry.scene)
        try:
            facts = run_facts(run, (), settings.threads, settings.save_memory)
        except (ValueError, OSError) as error:
            bad.append(InvalidEntry(entry.source, f"{entry.source}: {error}"))
            continue
        scene_key, seeds = digest(facts, model), entry.seeds or settings.seeds
        for start in range(0, len(seeds), settings.batch_size):
            some = seeds[start : start + settings.batch_size]
            jobs.append(Job(entry, run, some, scene_key, digest(scene_key, some)))
    return jobs, bad
