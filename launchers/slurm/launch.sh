#!/usr/bin/env bash
# What the three .sbatch files share. `launch.sh STAGE [ARGUMENTS]` runs once, in the batch script, and starts itself
# through srun on each node as `launch.sh on-node PORT RANKS HOSTS STAGE [ARGUMENTS]`, which starts that node's ranks.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

start_nodes() {
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job: start it with sbatch, or inside salloc"
  local ranks=${ADALA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} port hosts
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "ADALA_RANKS_PER_NODE (else SLURM_GPUS_ON_NODE) must be 1 or more, not $ranks"
  # Below Linux's ephemeral ports (32768 and up), so that no outgoing connection sits on it.
  port=$((20000 + SLURM_JOB_ID % 10000))
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # srun takes neither --cpus-per-task from sbatch (since Slurm 22.05) nor, after sbatch --export=NONE, the environment.
  local code=0
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash "$project/launchers/slurm/launch.sh" on-node "$port" "$ranks" "$hosts" "$@" || code=$?
  # By this code the trainer says that it was asked to end, and has saved. The same job goes on when it is its turn.
  if ((code == 75)); then
    scontrol requeue "$SLURM_JOB_ID" || echo "error: the job could not be queued again: submit the same command" >&2
  fi
  exit "$code"
}

run_node() {
  local port=$1 ranks=$2 stage=$4 hosts host resources=() slots
  mapfile -t hosts <<<"$3"
  shift 4
  # A hostfile of this node's own needs no shared folder. Its names are only counted: --no_ssh connects to none of them.
  hostfile=$(mktemp)
  trap 'rm -f "$hostfile"' EXIT
  # For the ranks alone, which have an answer of their own; this shell and DeepSpeed's launcher would be ended by it.
  trap '' USR2
  for host in "${hosts[@]}"; do
    slots=$ranks
    if [[ $host == "${hosts[$SLURM_NODEID]}" && ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then
      # Left alone, DeepSpeed takes GPUs 0, 1, ... on a node that is shared with other jobs, too: --include names ours.
      local gpus
      IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
      ((${#gpus[@]} >= ranks)) || fail "$host has GPUs $CUDA_VISIBLE_DEVICES, fewer than the $ranks ranks of each node"
      gpus=("${gpus[@]:0:ranks}")
      slots=$(($(printf '%s\n' "${gpus[@]}" | sort -n | tail -n 1) + 1))
      host+=:$(IFS=, && echo "${gpus[*]}")
    fi
    resources+=("$host")
    echo "${host%%:*} slots=$slots" >>"$hostfile"
  done
  deepspeed --no_ssh --hostfile "$hostfile" --include "$(IFS=@ && echo "${resources[*]}")" \
    --node_rank "$SLURM_NODEID" --master_addr "${hosts[0]}" --master_port "$port" \
    launchers/train.py --stage "$stage" "$@"
}

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$project"
if [[ -d .venv/bin ]]; then
  PATH=$project/.venv/bin:$PATH
fi
command -v deepspeed >/dev/null ||
  fail "there is no deepspeed command: install into $project/.venv, or activate the environment that has it"
if [[ $1 == on-node ]]; then
  shift
  run_node "$@"
else
  start_nodes "$@"
fi
