"""`python -m puzzle.launch.agent [INDEX]`: one host's share of a run, started by Ray or Slurm (hosts.py).

The first line of its input is the order; the input's end means that the launcher is gone. Without INDEX its
host is the one with the name that Slurm gave this node.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore

from puzzle.engine.runtime.watchdog import vouch
from puzzle.launch import local
from puzzle.launch.hosts import BEAT_SECONDS, END, FAILED, OVER, Order

LAST_SECONDS = 10


def main() -> int:
    """Run the share; the exit code of the first failure, 0 when all went well."""
    order = Order(**json.loads(sys.stdin.readline()))
    index = int(sys.argv[1]) if len(sys.argv) > 1 else order.hosts.index(os.environ["SLURMD_NODENAME"])
    counts = order.counts
    share = local.Share(sum(counts), sum(counts[:index]), counts[index], order.address, order.port)
    store = TCPStore(order.address, order.port, is_master=False, timeout=timedelta(seconds=30))
    signal.signal(local.PEER_ENDED, local.peer_ended)
    threading.Thread(target=_until_input_ends, daemon=True).start()
    ranks = range(share.first, share.first + share.count)
    logs = None if order.logs is None else Path(order.logs)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(store, index, ranks, over), daemon=True)
    death = None
    with local.terminate_as_exit():
        try:
            beat.start()
            death = local.host(order.target, order.args, share, logs)
            if death is not None:
                store.set(f"death/{index}", json.dumps(asdict(death)))
        except ConnectionError:  # told to end: a process elsewhere died
            return 1
        finally:  # however it ends: who says nothing was killed
            signal.alarm(LAST_SECONDS)  # the launcher may be gone
            over.set()
            beat.join()
            with contextlib.suppress(DistError):
                store.set(f"beat/{index}", OVER)
            signal.alarm(0)
    return 0 if death is None else death.code or 1


def _until_input_ends() -> None:
    while sys.stdin.readline():
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _beat(store: TCPStore, index: int, ranks: range, over: threading.Event) -> None:
    """Signs of life, and what is known of `ranks`, until it is over; ends this process when told to, or when
    the launcher is gone."""
    number = 0
    try:
        while not over.is_set() and not store.check([END]):
            store.set(f"beat/{index}", str(number))
            vouch(store, ranks)
            number += 1
            over.wait(BEAT_SECONDS)
    except DistError:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        if not over.is_set():
            failed = store.get(END) == FAILED.encode()
            os.kill(os.getpid(), local.PEER_ENDED if failed else signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
