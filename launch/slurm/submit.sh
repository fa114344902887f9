#!/bin/bash
# sbatch that refuses at once what sbatch would leave pending for ever, such as more nodes than a partition has.
# usage: submit.sh [OPTIONS OF SBATCH] SCRIPT [ARGUMENTS]; prints what sbatch prints
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/site.sh"

if ! said=$(timeout 45 sbatch --verbose --test-only "$@" 2>&1); then
    asked() { sed -n "s/^sbatch: $1 *: //p" <<<"$said" | tail -n 1; }
    reason=$(grep -E 'allocation failure|error:' <<<"$said" | tail -n 1 | sed -E 's/^(sbatch: )?(error|allocation failure): //')
    partition=$(asked partition)
    nodes=$(asked nodes)
    partition=${partition:-$(sinfo --noheader --format=%P 2>/dev/null | sed -n 's/\*$//p')}
    has=$(sinfo --noheader --partition="${partition:-none}" --format='%D nodes of %c CPUs, %m MB, GPUs %G, time %l' 2>/dev/null | paste -sd';')
    fail "not submitted: ${reason:-sbatch --test-only gave no answer within 45 s}: asked for ${nodes:-1} nodes in partition" \
        "'${partition:-unknown}', which has ${has:-no nodes}; change #SBATCH --nodes, --ntasks-per-node, --cpus-per-task" \
        "or --gres, or take another --partition (sinfo lists them)"
fi
exec sbatch "$@"
