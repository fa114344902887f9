#!/bin/bash
# What srun starts for each task: one process of the run.
# usage: task.sh SCRIPT ARGUMENTS...
trap '' USR2 # until Python holds it back; what is ignored is inherited, and a signal that comes before that is lost
set -u
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=python.sh
. "$root/launch/slurm/python.sh"

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
commas=${SLURM_GTIDS//[^,]/} # the ranks of this node
export LOCAL_WORLD_SIZE=$((${#commas} + 1))
export PATH=$VLSCALE_VENV/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=$root

status=0
find_python "$root" && "${command[@]}" "$@" || status=$?

# 2 (a mistake) and 75 (saved, more to do) are all ranks' at once: no crash, for which srun would end the others while
# they still write. Rank 0 leaves word for train.sh; the others wait until it has, or say themselves what went wrong.
[[ $status == 2 || $status == 75 ]] || exit "$status"
if [[ $RANK != 0 ]]; then
    for ((second = 0; second < (status == 2 ? 30 : 300); second++)); do
        [[ -s $VLSCALE_STATUS ]] && exit 0
        sleep 1
    done
fi
echo "$status" >"$VLSCALE_STATUS"
[[ $RANK == 0 ]] || exit "$status" # rank 0 does not know of it: srun ends it
