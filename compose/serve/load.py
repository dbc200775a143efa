"""A load test of a server on this machine: `python -m lora_compose.compose.serve.load`.

`loras FOLDER` makes many LoRA files, copies of the playground's with other weights. `run URL` sends requests that name
any two of the server's LoRAs, and shows their times, the images per minute, and the memory of the server over time.
With `--warm-up` each LoRA is named once before, so that all files have been read.
"""

import json
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compose.compose.playground.assets import assets_dir
from lora_compose.compose.support.terminal import bar, echo

app = typer.Typer(help="Load test of lora-compose serve.", no_args_is_help=True, pretty_exceptions_enable=False)

_SAMPLES = 20  # of the memory


@dataclass(frozen=True)
class Load:
    """The results of a load test.

    Attributes:
        seconds: Time of each request, refusals and waiting included.
        refused: Number of refusals because the queue was full.
        together: Mean number of images in a batch.
        wall: Seconds from the first request to the last.
        memory: Bytes of the server, over time.
    """

    seconds: tuple[float, ...]
    refused: int
    together: float
    wall: float
    memory: tuple[int, ...]

    @property
    def per_minute(self) -> float:
        """Images per minute."""
        return 60 * len(self.seconds) / self.wall


def make_loras(folder: Path, number: int) -> None:
    """Writes copies of the playground's ordinary LoRAs whose weights differ: `bear-000`, `cat-001`, ..."""
    files = sorted((assets_dir() / "playground/loras").glob("*.safetensors"))
    originals = [path for path in files if not path.stem.endswith("-tara")]
    folder.mkdir(parents=True, exist_ok=True)
    factors = random.Random(0)
    for i in range(number):
        path = originals[i % len(originals)]
        with safe_open(path, "pt") as file:
            factor = factors.uniform(0.7, 1.3)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            scaled = {name: tensors[name] * factor for name in tensors if "lora_B" in name}
            save_file({**tensors, **scaled}, folder / f"{path.stem}-{i:03}.safetensors", file.metadata())


def load_test(url: str, requests: int, clients: int, fields: Mapping[str, Any], *, warm_up: bool = False) -> Load:
    """Sends requests for any two LoRAs of a server; `warm_up` first names each LoRA once, which is not measured."""
    loras = {name: words for name, words in _get(f"{url}/loras").items() if words["trigger"] and words["class_word"]}
    choice, names = random.Random(0), sorted(loras)
    pairs = [_pair(choice, names, loras) for _ in range(requests)]
    if warm_up:
        _send(url, [_body([name], loras, fields) for name in names], clients, "naming each LoRA once")
    return _send(url, [_body(pair, loras, {**fields, "seed": i}) for i, pair in enumerate(pairs)], clients)


def _send(url: str, bodies: Sequence[bytes], clients: int, what: str = "sending requests") -> Load:
    requests = len(bodies)
    refused, together, memory, lock = 0, [], [_get(f"{url}/health")["memory_bytes"]], threading.Lock()

    def send(body: bytes) -> float:
        nonlocal refused
        start = time.monotonic()
        while True:
            try:
                asked = urllib.request.Request(f"{url}/images", body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(asked, timeout=600) as response:
                    response.read()
                    with lock:
                        together.append(int(response.headers["X-Images-Together"]))
                        on_progress(len(together))
                        if len(together) % max(1, requests // _SAMPLES) == 0:
                            memory.append(_get(f"{url}/health")["memory_bytes"])
                    return time.monotonic() - start
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise RuntimeError(f"{error.code}: {error.read().decode()}") from error
                with lock:
                    refused += 1
                time.sleep(float(error.headers["Retry-After"]))

    begun = time.monotonic()
    with bar(what, requests) as on_progress, ThreadPoolExecutor(clients) as pool:
        seconds = tuple(pool.map(send, bodies))
    return Load(seconds, refused, statistics.mean(together), time.monotonic() - begun, tuple(memory))


def _pair(choice: random.Random, names: Sequence[str], loras: Mapping[str, Any]) -> tuple[str, str]:
    first = choice.choice(names)
    return first, choice.choice([name for name in names if loras[name]["trigger"] != loras[first]["trigger"]])


def _body(concepts: Sequence[str], loras: Mapping[str, Any], fields: Mapping[str, Any]) -> bytes:
    prompt = " and ".join(f"a {loras[name]['trigger']} {loras[name]['class_word']}" for name in concepts)
    return json.dumps({**fields, "prompt": prompt, "concepts": list(concepts)}).encode()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


@app.command("loras")
def loras_command(folder: Path, number: int = 500) -> None:
    """Write many LoRA files into a folder."""
    make_loras(folder, number)
    echo(f"{number} LoRA files in {folder}")


@app.command("run")
def run_command(
    url: str,
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    size: Annotated[int, typer.Option(min=8)] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 1,
    warm_up: Annotated[
        bool, typer.Option(help="Name each LoRA once before, so that all files have been read.")
    ] = False,
) -> None:
    """Send requests to a server and show its throughput."""
    fields = {"width": size, "height": size, "steps": steps, "guidance_scale": 5}
    load = load_test(url, requests, clients, fields, warm_up=warm_up)
    cuts = statistics.quantiles(load.seconds, n=20) if len(load.seconds) > 1 else [*load.seconds] * 19
    echo(f"{requests} requests of {size} x {size}, {steps} steps, {clients} clients")
    echo(f"{load.per_minute:.0f} images per minute, {load.together:.1f} of them together; {load.refused} refusals")
    echo(f"p50 {statistics.median(load.seconds):.2f} s, p95 {cuts[18]:.2f} s")
    echo("memory in MiB: " + " ".join(f"{size / 2**20:.0f}" for size in load.memory))


if __name__ == "__main__":
    app()
