#!/bin/bash
# Trains inside an allocation, of sbatch or salloc: rendezvous, binding, a log per rank, and what follows an end.
# usage: train.sh --ds_config FILE --run_dir FOLDER [options of launch/pretrain.py]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/site.sh"
. "$here/requeue.sh"
trap '' USR2 # it is for the tasks; `scancel --signal=USR2 --full` sends it here too
cd "$root"

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not inside a job; use sbatch $here/many_nodes.sbatch or salloc"
run_dir=
previous=
for word in "$@"; do
    [[ $previous == --run_dir ]] && run_dir=$word
    [[ $word == --run_dir=* ]] && run_dir=${word#*=}
    [[ $word == --resume* ]] && fail "$word: a job resumes by itself; leave it out, or copy that checkpoint's run folder"
    previous=$word
done
[[ -n $run_dir ]] || fail "no --run_dir FOLDER among the arguments; it is where a restarted job finds its checkpoints"
[[ $run_dir != *[%\\]* ]] || fail "--run_dir $run_dir: Slurm gives % and \\ in a path a meaning; choose another name"

# Rendezvous.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
VLSCALE_HOSTS=$(paste -sd, <<<"$hosts")
export VLSCALE_HOSTS
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))} # below the ports that Linux gives out by itself
# A rank that lost a peer ends instead of waiting for it; what NCCL warns of is in the rank's log.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A task's cores: its reader processes' first, the rest for PyTorch's threads.
cpus=${SLURM_CPUS_PER_TASK:-1}
threads=$((cpus - ${VLSCALE_WORKERS:-0}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

logs=$run_dir/logs/$SLURM_JOB_ID
mkdir -p -- "$logs" || fail "$logs cannot be made; give another --run_dir"
claim "$run_dir"
begin_attempt "$run_dir" "$logs"
export VLSCALE_STATUS=$logs/status
export VLSCALE_RUN_ID=slurm-$job_id-${SLURM_RESTART_COUNT:-0} # ranks of another run, at the same port, are told apart
: >"$VLSCALE_STATUS"
echo "slurm: job $job_id on $VLSCALE_HOSTS, rank 0 at $MASTER_ADDR:$MASTER_PORT; logs: $logs/rank-*.log; rank 0:"

exported=$(forwarded)
# Rank 0's log is shown here as well.
touch "$logs/rank-000.log"
tail -n 0 -F --pid=$$ "$logs/rank-000.log" 2>/dev/null &
shown=$!
status=0
# --wait: no site's default; longer than task.sh waits for rank 0.
srun --export="$exported" --cpus-per-task="$cpus" --cpu-bind=verbose,cores --distribution=block \
    --kill-on-bad-exit=1 --wait=600 --input=none --open-mode=append --output="$logs/rank-%3t.log" \
    "$here/task.sh" "${VLSCALE_SCRIPT:-launch/pretrain.py}" "$@" --resume auto || status=$?
sleep 1 # for tail to read the end
kill "$shown" 2>/dev/null || true
end_attempt "$run_dir" "$logs" "$(agreed_status "$VLSCALE_STATUS" "$status")"
