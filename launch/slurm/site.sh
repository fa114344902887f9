# shellcheck shell=bash
# Sourced by the other scripts: where things are, the site's settings, and how to fail.
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=${here%/launch/slurm}

# One line and status 2: a mistake, which is not tried again.
fail() {
    echo "slurm: error: $*" >&2
    exit 2
}

if [[ -f $here/site.env ]]; then
    set +u # `module load` reads variables that are not set
    # shellcheck source=site.env.example
    . "$here/site.env" || fail "$here/site.env: status $?; try: bash -x $here/site.env"
    set -u
fi
VLSCALE_VENV=${VLSCALE_VENV:-$root/.venv}
VLSCALE_MAX_RESTARTS=${VLSCALE_MAX_RESTARTS:-3}
[[ $VLSCALE_MAX_RESTARTS =~ ^[0-9]{1,4}$ ]] || fail "VLSCALE_MAX_RESTARTS is '$VLSCALE_MAX_RESTARTS'; expected a number"
export VLSCALE_VENV

# The list for `srun --export`: names of variables that tasks get besides Slurm's own; nothing else reaches them.
forwarded() {
    local name names=()
    for name in PATH HOME USER LOGNAME LANG LC_ALL TMPDIR LD_LIBRARY_PATH CC CXX CUDA_HOME TORCH_EXTENSIONS_DIR HF_HOME \
        DS_ACCELERATOR OMP_NUM_THREADS MASTER_ADDR MASTER_PORT \
        $(compgen -e NCCL_) $(compgen -e TORCH_NCCL_) $(compgen -e GLOO_) $(compgen -e UCX_) $(compgen -e VLSCALE_) \
        ${VLSCALE_EXPORT:-}; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "VLSCALE_EXPORT: '$name' is not the name of a variable"
        [[ -n ${!name+set} && " ${names[*]:-} " != *" $name "* ]] && names+=("$name")
    done
    local IFS=,
    echo "${names[*]}"
}
