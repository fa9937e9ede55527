#!/usr/bin/env bash
# `sbatch conf/cluster/launch/slurm.sh model=llama-3.1-8b data=local data.train=/shared/my.jsonl`
# runs one sweep over all nodes of the job, with a trial on each card. `resume=<sweep folder>` in
# place of the options continues a sweep. Submit it from the folder of the project and its .venv
# (with ray[default] for metrics of the nodes). All nodes must share that folder and the sweep folder.
#
# Slurm sends SIGTERM 120 s before it ends a job (time limit, scancel, preemption). The driver then
# stops at a safe point and says how to resume.
#SBATCH --job-name=qlora-sweep
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=qlora-sweep-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
bin="$PWD/.venv/bin"
port=$((20000 + SLURM_JOB_ID % 20000))

# The token goes into a file that only this user can read. Slurm copies the environment to other
# nodes and may store it.
token="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')
gpus=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:?a job with GPUs is needed}))

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  "$bin/ray" start --block --head --node-ip-address="$address" --port="$port" --include-dashboard=false \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --metrics-export-port=8080 &
nodes=("$!")
sleep "${RAY_HEAD_START_S:-10}"
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    "$bin/ray" start --block --address="$address:$port" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --metrics-export-port=8080 &
  nodes+=("$!")
fi

# The script runs on the head node, so the driver needs no srun: a second step would wait for the
# cores that Ray's step holds.
driver=""
trap '[[ -z $driver ]] || kill -TERM "$driver"' TERM
options=("cluster.address=$address:$port" "cluster.num_gpus=$gpus" cluster.wait_s=300)
[[ " $* " == *" resume="* ]] || options=(cluster=ray "${options[@]}")
code=0
"$bin/python" -m sweep "${options[@]}" "$@" &
driver=$!
wait "$driver" || code=$?
if ((code > 128)); then # the trap ended the wait; the driver may still be running
  wait "$driver" && code=0 || code=$?
fi
kill "${nodes[@]}" 2> /dev/null || true
wait "${nodes[@]}" || true
rm -f "$token"
exit "$code"
