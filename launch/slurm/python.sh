# shellcheck shell=bash
# Sourced by task.sh and import.sh: how Python starts on this host, in the image or the environment of site.env.

# Set the array `command`; status 2, with one line, where this host has no such Python.
find_python() {
    local root=$1 nvidia=() host=${SLURMD_NODENAME:-$HOSTNAME}
    if [[ -n ${VLSCALE_IMAGE:-} ]]; then
        [[ -e /dev/nvidiactl ]] && nvidia=(--nv)
        unset CC CXX CUDA_HOME # the host's compilers, which the image has not
        command=(apptainer exec "${nvidia[@]}" --bind "$root${VLSCALE_BIND:+,$VLSCALE_BIND}" --pwd "$PWD" "$VLSCALE_IMAGE" python)
        [[ -e $VLSCALE_IMAGE || $VLSCALE_IMAGE == *://* ]] && type -P apptainer >/dev/null && return 0
        echo "slurm: error: host $host: no $VLSCALE_IMAGE or no apptainer; see VLSCALE_IMAGE in launch/slurm/site.env" >&2
    else
        command=("$VLSCALE_VENV/bin/python")
        [[ -x ${command[0]} ]] && return 0
        echo "slurm: error: host $host: no ${command[0]}; set VLSCALE_VENV in launch/slurm/site.env to what all nodes see" >&2
    fi
    return 2
}
