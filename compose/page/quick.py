"""The quick suite, started from the page: `lora-compose evaluate` in a process of its own."""

import atexit
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Literal

NAME = "playground-quick"
REPORT = "report.html"

State = Literal["idle", "running", "done", "failed", "stopped"]


class Quick:
    """The quick suite; one at a time for all sessions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NAME
        self.state: State = "idle"
        self._output: deque[str] = deque(maxlen=20)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    @property
    def output(self) -> str:
        """The last lines that it has printed."""
        return "\n".join(self._output)

    @property
    def share(self) -> float:
        """The finished fraction, up to 1."""
        from lora_compose.compose.evaluation.results import PLAN, Plan, is_done
        from lora_compose.compose.files.stored import read

        plan = read(self.folder / PLAN, Plan)
        if plan is None:
            return 0.0
        return sum(is_done(self.folder, planned) for planned in plan.batches) / len(plan.batches)

    def start(self) -> None:
        """Starts or resumes it. Does nothing while it runs."""
        with self._lock:
            if self.state == "running":
                return
            self._output.clear()
            # One process: images need a processor, too.
            command = [sys.executable, "-m", "lora_compose", "evaluate", "run", NAME, "--out", str(self.folder)]
            command += ["--processes", "1"]
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
            )
            self.state = "running"
            atexit.register(self.stop)
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def stop(self) -> None:
        """Stops it; what is finished is kept."""
        with self._lock:
            if self._process is not None and self.state == "running":
                self.state = "stopped"
                self._process.terminate()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout or ():
            self._output.append(line.rstrip()[:500])
        code = process.wait()
        with self._lock:
            if self.state == "running":
                self.state = "failed" if code else "done"


def reports(folder: Path) -> list[Path]:
    """The reports of the evaluations in a folder, the newest first."""
    found = list(folder.glob(f"*/{REPORT}")) if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
