"""One tracker in a process of its own: `python -m puzzle.rlhf.tracker_process` reads JSON lines until its
standard input ends, and answers each that the tracker has taken with a line: `{}`, or the error that ends it.

The trackers are those of accelerate.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

LAST_SECONDS = 60.0
"""So long a tracker may need to finish when nobody listens any more."""


def make(settings: dict[str, Any]) -> Any:
    """accelerate's tracker `settings["name"]`, started, with the configuration stored."""
    from accelerate import PartialState, tracking

    PartialState(cpu=True)  # one process, of no run
    name, project, run = settings["name"], settings["project"], settings["run"]
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(name, settings["out"])
    elif name == "wandb":
        resumed = {"id": settings["run_id"], "resume": "allow"}
        tracker = tracking.WandBTracker(project, name=run, dir=settings["out"], **resumed)
    elif name == "mlflow":
        tracker = tracking.MLflowTracker(project, run_name=run)
    else:
        tracker = tracking.TrackioTracker(project, name=run, resume="allow")
    tracker.start()
    tracker.store_init_configuration(settings["config"])
    return tracker


def lines() -> Iterator[str]:
    """The lines of standard input; when it ends, this process ends within LAST_SECONDS, whatever it does."""
    taken: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            taken.put(line)
        taken.put(None)
        threading.Event().wait(LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    yield from iter(taken.get, None)


def main() -> int:
    """Exit code 1 after an error, which was answered."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it says when it ends
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    tracker: Any = None
    try:
        for line in lines():
            told = json.loads(line)
            if tracker is None:
                tracker = make(told)
            else:
                tracker.log(told["values"], step=told["step"])
            print("{}", file=answers)
        if tracker is not None:
            tracker.finish()
    except Exception as error:  # noqa: BLE001 - whatever a tracker does
        said = " ".join(str(error).split())
        print(json.dumps({"error": f"{type(error).__name__}: {said}"[:300]}), file=answers)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
