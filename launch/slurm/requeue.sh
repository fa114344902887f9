# shellcheck shell=bash
# Sourced by train.sh: whether a job starts again. Progress is the step in RUN_DIR/checkpoints/latest; what a start found
# there is kept in LOGS/restarts as "step restarts", so that a node that died, and took this script with it, counts too.

# Print the step of the newest checkpoint of a run folder, or "none".
newest_step() {
    local name=
    { IFS= read -r name <"$1/checkpoints/latest"; } 2>/dev/null || true
    [[ $name =~ ^step-([0-9]{1,15})$ ]] && echo "${BASH_REMATCH[1]}" || echo none
}

# Print the status of a run: what rank 0 left in a file, or else srun's.
agreed_status() {
    local left=
    { IFS= read -r left <"$1"; } 2>/dev/null || true
    [[ $left == 2 || $left == 75 ]] && echo "$left" || echo "$2"
}

# Before the tasks start: count a restart, or stop the job if there were too many without progress.
begin_attempt() {
    local run_dir=$1 logs=$2 found=
    started_from=$(newest_step "$run_dir")
    restarts=0
    { IFS= read -r found <"$logs/restarts"; } 2>/dev/null || true
    # A person who starts again inside one salloc is not counted.
    if ((${SLURM_RESTART_COUNT:-0} > 0)) &&
        [[ $found =~ ^(none|[0-9]{1,15})\ ([0-9]{1,6})$ && ${BASH_REMATCH[1]} == "$started_from" ]]; then
        restarts=$((BASH_REMATCH[2] + 1))
    fi
    ((restarts <= VLSCALE_MAX_RESTARTS)) || give_up "$logs" "the nodes failed, or the job was ended from outside"
    if ! { echo "$started_from $restarts" >"$logs/restarts.new" && mv -f -- "$logs/restarts.new" "$logs/restarts"; }; then
        fail "$logs cannot be written to; give another --run_dir"
    fi
}

# After the tasks ended with STATUS: done, stopped for good, or requeued. Does not return.
end_attempt() {
    local run_dir=$1 logs=$2 status=$3 why
    case $status in
    0)
        echo "slurm: job $SLURM_JOB_ID is done"
        exit 0
        ;;
    2)
        # Rank 0's log is shown above; if it has no error, show that of another rank.
        tail -n 20 -- "$logs/rank-000.log" | grep -q ': error: ' ||
            tail -q -n 20 -- "$logs"/rank-*.log | grep ': error: ' | sort -u | tail -n 3 >&2 || true
        fail "job $SLURM_JOB_ID ended by a mistake that a restart would repeat; see $logs/rank-*.log"
        ;;
    75) why="it was asked to stop, and has saved" ;;
    *) why="it ended with status $status" ;;
    esac
    if [[ $(newest_step "$run_dir") == "$started_from" ]] && ((restarts >= VLSCALE_MAX_RESTARTS)); then
        give_up "$logs" "$why"
    fi
    requeue "$why" "$status"
}

give_up() {
    echo "slurm: error: job $SLURM_JOB_ID stops: $VLSCALE_MAX_RESTARTS restarts in a row brought it no further than step" \
        "$started_from; last, $2; see $1/rank-*.log" >&2
    exit 1
}

# Have Slurm start the job again, if it is a batch job that nobody cancelled.
requeue() {
    local why=$1 status=$2 job said
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || job=
    if [[ $job != *" BatchFlag=1"* ]]; then
        echo "slurm: $why; the same command goes on from step $(newest_step "$run_dir")"
    elif [[ $job != *" JobState=RUNNING"* ]]; then
        echo "slurm: $why; cancelled or out of time, so not requeued; submitted again, it goes on from the newest checkpoint"
    else
        # Said first: requeueing ends this script.
        echo "slurm: job $SLURM_JOB_ID: $why at step $(newest_step "$run_dir"); requeueing"
        said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && exit 0
        echo "slurm: error: the job cannot be requeued (${said:0:200}); submit it again, it goes on by itself" >&2
    fi
    exit "$status"
}
