"""Imported by the fork server alone: it ends at once when nobody is left who could ask it for a process.

To clear away all that it has imported, as an interpreter does at its end, takes seconds on a busy host.
"""

import atexit
import os


def _leave(server: int) -> None:
    if os.getpid() == server:  # not the ranks, which have this from their fork
        os._exit(0)


atexit.register(_leave, os.getpid())
