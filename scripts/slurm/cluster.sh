#!/usr/bin/env bash
# A private Slurm of some nodes on this one host, for tests: a controller, node daemons and munge, all with their own
# configuration and state in DIR. Needs root; on Debian it installs Slurm, which stays without configuration.
#   scripts/slurm/cluster.sh start DIR [NODES] [CORES]     (4 nodes of 8 cores each; more than there are is fine)
#   scripts/slurm/cluster.sh stop DIR
# Afterwards SLURM_CONF=DIR/slurm.conf makes srun, sbatch and the rest talk to it.
set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }

start() {
  local dir=$1 nodes=$2 cores=$3 node host ports=()
  [ "$(id -u)" = 0 ] || die "a private Slurm needs root"
  if [ -e /etc/slurm/slurm.conf ] || [ -n "${SLURM_CONF:-}" ] || pgrep -x slurmctld >/dev/null || pgrep -x slurmd >/dev/null; then
    die "there is a Slurm on this host already; its daemons and settings are left alone"
  fi
  if ! (command -v slurmctld && command -v slurmd && command -v srun && command -v munged) >/dev/null; then
    command -v apt-get >/dev/null || die "install Slurm (slurmctld, slurmd, slurm-client) and munge first"
    echo "puzzle: installing Slurm (apt-get)" >&2
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
      slurmctld slurmd slurm-client munge; } </dev/null >/dev/null 2>&1 || die "apt-get could not install Slurm"
  fi
  mkdir -p "$dir"/{state,munge}
  chmod 755 "$dir"
  # Free ports, found by asking the kernel for all of them at once; the range is not the one it deals out from.
  mapfile -t ports < <(python3 -c '
import random, socket, sys
found = []
while len(found) < int(sys.argv[1]):
    port = random.randrange(20000, 30000)
    with socket.socket() as trial:
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            continue
    if port not in found:
        found.append(port)
print(*found, sep="\n")' $((nodes + 1)))
  host=$(hostname -s)
  dd if=/dev/urandom bs=1 count=1024 of="$dir/munge/key" 2>/dev/null
  chmod 400 "$dir/munge/key"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  {
    cat <<END
ClusterName=private
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmdTimeout=30
SchedulerParameters=sched_interval=2,defer
END
    for ((node = 1; node <= nodes; node++)); do
      mkdir -p "$dir/spool-node$node"
      echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node]} CPUs=$cores State=UNKNOWN"
    done
    echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
  } >"$dir/slurm.conf"
  printf '%s\n' CgroupPlugin=autodetect ConstrainCores=no ConstrainRAMSpace=no >"$dir/cgroup.conf"
  export SLURM_CONF="$dir/slurm.conf"
  slurmctld -i
  for ((node = 1; node <= nodes; node++)); do slurmd -N "node$node"; done
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" = "$nodes" ] && return
    sleep 0.2
  done
  stop "$dir"
  die "the private Slurm did not come up; see the logs in $dir"
}

stop() {
  local dir=$1 file pids=()
  if [ -e "$dir/slurmctld.pid" ]; then
    SLURM_CONF="$dir/slurm.conf" timeout 20 scancel --user=root || true
    for _ in $(seq 60); do # until their processes are gone, too
      [ -n "$(SLURM_CONF="$dir/slurm.conf" timeout 5 squeue --noheader)" ] || break
      sleep 0.5
    done
  fi
  for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
    [ -e "$file" ] && pids+=("$(cat "$file")")
  done
  [ "${#pids[@]}" -gt 0 ] || return 0
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 100); do
    [ -n "$(ps -o pid= -p "$(IFS=,; echo "${pids[*]}")")" ] || return 0
    sleep 0.1
  done
}

case "${1:-} ${2:-}" in
  "start "?*) start "$2" "${3:-4}" "${4:-8}" ;;
  "stop "?*) stop "$2" ;;
  *) die "usage: cluster.sh start DIR [NODES] [CORES] | stop DIR" ;;
esac
