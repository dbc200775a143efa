"""The program of a process that `launch` has started: `lora-compose`, until its parent ends.

The system closes the other end of the standard input when the parent ends, even if it is killed. The source of this
module is run with `python -c`, before any slow import.
"""

import os
import runpy
import threading


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written to it
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("lora_compose", run_name="__main__", alter_sys=True)
