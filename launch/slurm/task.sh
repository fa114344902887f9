#!/bin/bash
# What srun starts for each task: one process of the run.
# usage: task.sh SCRIPT ARGUMENTS...
trap '' USR2 # until Python holds it back; what is ignored is inherited
set -u
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
commas=${SLURM_GTIDS//[^,]/} # the ranks of this node
export LOCAL_WORLD_SIZE=$((${#commas} + 1))
export PATH=$VLSCALE_VENV/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=$root
command=("$VLSCALE_VENV/bin/python")
if [[ -n ${VLSCALE_IMAGE:-} ]]; then
    nvidia=()
    [[ -e /dev/nvidiactl ]] && nvidia=(--nv)
    command=(apptainer exec "${nvidia[@]}" --bind "$root${VLSCALE_BIND:+,$VLSCALE_BIND}" --pwd "$PWD" "$VLSCALE_IMAGE" python)
fi

status=0
if [[ -z ${VLSCALE_IMAGE:-} && ! -x ${command[0]} ]]; then
    echo "slurm: error: host ${SLURMD_NODENAME:-$HOSTNAME}: no ${command[0]}; set VLSCALE_VENV in launch/slurm/site.env to what all nodes see" >&2
    status=2
else
    "${command[@]}" "$@" || status=$?
fi

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
