#!/bin/bash
# sbatch that refuses at once what sbatch would leave pending for ever, such as more nodes than a partition has.
# usage: submit.sh [OPTIONS OF SBATCH] SCRIPT [ARGUMENTS]; prints what sbatch prints
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/site.sh"

asked() { sed -n "s/^sbatch: $1 *: //p" <<<"$said" | tail -n 1; }
# What nodes have, healthy or not, in sinfo's format, a line per kind of node.
nodes_have() { sinfo --noheader --exact --partition="${partition:-none}" --format="$1" 2>/dev/null || true; }
# The largest number at the start of a line, or of GPUs.
most() { { echo 0; grep -oP '(^|gpu:([^:,]*:)?)\K[0-9]+'; } | sort -n | tail -n 1; }

if ! said=$(timeout 45 sbatch --verbose --test-only "$@" 2>&1); then
    reason=$(grep -E 'error: |failure: |unrecognized' <<<"$said" | tail -n 2 |
        sed -E 's/^(sbatch: )?((error|allocation failure): )?//' | paste -sd';' | sed 's/;/; /') || true
    reason=${reason:-sbatch --test-only gave no answer within 45 s}
    # Said of what can never start, but also of what has to wait for a node that is down.
    [[ $reason =~ configuration|"not available"|busy ]] || fail "not submitted: $reason"

    partition=$(asked partition)
    partition=${partition:-$(sinfo --noheader --format=%P 2>/dev/null | sed -n 's/\*$//p')} || true
    nodes=$(asked nodes) tasks=$(asked ntasks-per-node) cpus=$(asked cpus-per-task)
    nodes=${nodes%%-*} total=$(nodes_have %D | paste -sd+)
    has=$(nodes_have '%D nodes of %c CPUs, %m MB, GPUs %G, time %l' | paste -sd';')
    what="$reason: asked for ${nodes:-1} nodes in partition '${partition:-unknown}', which has ${has:-no nodes}"
    if ((${nodes:-1} > ${total:-0})) || ((${tasks:-1} * ${cpus:-1} > $(nodes_have %c | most))) ||
        (($(asked gres | most) > $(nodes_have %G | most))); then
        fail "not submitted: $what; change #SBATCH --nodes, --ntasks-per-node, --cpus-per-task or --gres," \
            "or take another --partition (sinfo lists them)"
    fi
    echo "slurm: warning: submitted, but it cannot start now: $what; are some of them down? (sinfo -R)" >&2
fi
exec sbatch "$@"
