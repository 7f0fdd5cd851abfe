"""What there is to run on: this host, a Ray cluster, a Slurm job, or the nodes that Slurm shall give."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from puzzle.launch import Launcher, slurm


@dataclass(frozen=True)
class Machine:
    """GPUs per host and in all (0: none; None: as many as asked for), bytes of one GPU if known, in words,
    and the name of a GPU if known."""

    per_host: int
    total: int | None
    memory: int | None
    words: str
    gpu: str = ""

    def name(self, devices: int) -> str:
        """What figures call so many of its GPUs, and that NCCL is kept from copying between them."""
        if not self.gpu:
            return "local"
        through_host = os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")
        return f"{devices} {self.gpu}" + ", no P2P" * through_host


def find_machine(launcher: Launcher) -> Machine:
    """What `launcher` would run on; raises UserError where that is not there."""
    if launcher == "ray" and os.environ.get("RAY_ADDRESS"):
        return _ray_cluster()
    if launcher != "local" and slurm.inside():
        nodes = slurm.job_nodes("auto")
        gpus = slurm.gpus_here()
        words = f"this Slurm job has {len(nodes)} nodes with {gpus or 'no'} GPUs each"
        return Machine(gpus, gpus * len(nodes), None, words)
    if launcher == "slurm":
        gpus = slurm.settings().devices
        return Machine(gpus, None, None, f"Slurm is asked for nodes with {gpus or 'no'} GPUs each")
    return _this_host()


def _this_host() -> Machine:
    listed: list[str] = []
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        listed = answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    cores = len(os.sched_getaffinity(0))
    elsewhere = "" if slurm.inside() or not slurm.is_here() else "; --launcher slurm runs on Slurm's nodes"
    if not listed:
        return Machine(0, 0, None, f"this machine has no GPUs and {cores} cores{elsewhere}")
    name, _, mebibytes = listed[0].rpartition(", ")
    return Machine(
        len(listed),
        len(listed),
        int(mebibytes) << 20,
        f"this machine has {len(listed)} GPUs ({name}) and {cores} cores{elsewhere}",
        name.removeprefix("NVIDIA "),
    )


def _ray_cluster() -> Machine:
    from puzzle.launch.ray import cluster

    with cluster(0, "auto"):
        import ray

        rooms = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    words = f"the Ray cluster has {len(rooms)} nodes with {sum(rooms) or 'no'} GPUs in all"
    return Machine(max(rooms), sum(rooms), None, words)
