"""What a thread does, read off its stack."""

from __future__ import annotations

from types import FrameType

import torch.distributed as dist
from torch import Tensor


def operation(frame: FrameType | None) -> str | None:
    """The collective or message in which a thread is: `all_reduce of float32 (4, 2) over ranks 0, 1`."""
    inside = None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name == "torch.distributed.distributed_c10d":
            inside = frame
        elif not name.startswith("torch.distributed") and inside is not None:
            return _describe(inside)
        frame = frame.f_back
    return None


def _describe(frame: FrameType) -> str:
    words, values = [frame.f_code.co_name], frame.f_locals
    tensor = next((v for v in values.values() if isinstance(v, Tensor)), None)
    if tensor is not None:
        words.append(f"of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}")
    for way, end in (("to", "dst"), ("from", "src")):
        if isinstance(values.get(end), int):
            words.append(f"{way} rank {values[end]}")
    group = values.get("group")
    if isinstance(group, dist.ProcessGroup):
        words.append(f"over ranks {', '.join(map(str, dist.get_process_group_ranks(group)))}")
    return " ".join(words)


def stack(frame: FrameType | None) -> str:
    """A thread's frames, a line each, the innermost first, as faulthandler writes them."""
    lines = []
    while frame is not None:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
        frame = frame.f_back
    return "".join(lines)
