#!/usr/bin/env bash
# A whole Slurm on this machine, for trying `pilaf-ray submit --to slurm`: munge, a controller and one node.
# Jobs in partition `high` preempt those in `low`, which get GRACE_SECONDS (120) to save. The two daemons listen at
# SLURM_PORT (7817) and the port after it.
# Needs root and Debian's slurm-wlm and munge. usage: local_slurm.sh start|stop FOLDER
set -euo pipefail
action=${1:?start or stop} folder=$(realpath -m "${2:?a folder for its state}")
export SLURM_CONF=$folder/slurm.conf
port=${SLURM_PORT:-7817} grace=${GRACE_SECONDS:-120}

stop() {
  timeout 20 scancel --full --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 40); do
    if [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ]; then break; fi
    sleep 0.5
  done
  for name in slurmd slurmctld munged; do
    if [ ! -f "$folder/$name.pid" ]; then continue; fi
    pid=$(cat "$folder/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
      if ! kill -0 "$pid" 2>/dev/null; then break; fi
      sleep 0.1
    done
  done
}
if [ "$action" = stop ]; then stop; exit; fi

mkdir -p "$folder"/{state,spool} && chmod 755 "$folder"
head -c 1024 /dev/urandom >"$folder/munge.key" && chmod 400 "$folder/munge.key"
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
cat >"$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=$port
SlurmdPort=$((port + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=10
MinJobAge=3600
# nproc without --all would count what OMP_NUM_THREADS says.
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$memory State=UNKNOWN
PartitionName=low Nodes=$(hostname -s) Default=YES PriorityTier=1 GraceTime=$grace PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=$(hostname -s) PriorityTier=10 PreemptMode=OFF State=UP
EOF
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 60); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then echo "export SLURM_CONF=$SLURM_CONF"; exit 0; fi
  sleep 0.5
done
echo "error: the node did not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
exit 1
