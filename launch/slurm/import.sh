#!/bin/bash
# One share of a data tool's work, or the merge of all, as a task of an array of jobs.
# usage: import.sh SHARES TOOL ARGUMENTS... [--merge]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/site.sh"
. "$here/python.sh"
shares=$1 tool=${2:-} task=${SLURM_ARRAY_TASK_ID:-}
[[ -n $task ]] || fail "not a task of an array; use sbatch $here/import_array.sbatch"
[[ $shares =~ ^[1-9][0-9]{0,4}$ ]] || fail "shares is '$shares'; expected a number, as many as --array has"
case $tool in
import_images | import_texts | extract_regions) ;;
*) fail "'$tool' is no tool that works in shares; expected import_images, import_texts or extract_regions" ;;
esac
shift 2
cpus=${SLURM_CPUS_PER_TASK:-1}
share=(--shard "$task/$shares")
if [[ " $* " == *" --merge "* ]]; then
    share=()
elif ((task >= shares)); then
    fail "task $task of the array, but there are $shares shares (0 to $((shares - 1))); make --array and shares agree"
elif ((SLURM_ARRAY_TASK_COUNT > shares)); then
    fail "$SLURM_ARRAY_TASK_COUNT tasks for $shares shares; make --array and shares agree"
fi
[[ $tool == extract_regions || " $*" == *" --workers"[\ =]* ]] || share+=(--workers "$cpus")
cd "$root"
find_python "$root" || exit 2
export PATH=$VLSCALE_VENV/bin:$PATH OMP_NUM_THREADS=1
exported=$(forwarded)
exec srun --ntasks=1 --export="$exported" --cpus-per-task="$cpus" --cpu-bind=cores \
    "${command[@]}" -m "data_tools.$tool" "$@" "${share[@]}"
