# shellcheck shell=bash
# Sourced by train.sh: whether a job starts again. Progress is the step in RUN_DIR/checkpoints/latest; what a start found
# there is kept in LOGS/restarts as "step restarts", so that a node that died, and took this script with it, counts too.

# In an array, the number alone may mean all of its tasks.
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job_id=${job_id:-${SLURM_JOB_ID:-}}

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

# Take the run folder for this job, unless another that runs, or waits to go on, has it.
claim() {
    local file=$1/logs/owner owner=
    (set -o noclobber && echo "$job_id" >"$file") 2>/dev/null && return
    { IFS= read -r owner <"$file"; } 2>/dev/null || true
    if [[ $owner =~ ^[0-9_]{1,30}$ && $owner != "$job_id" && -n $(squeue --noheader --jobs="$owner" 2>/dev/null) ]]; then
        fail "job $owner has --run_dir $1 (squeue lists it); give another one, or: scancel $owner"
    fi
    echo "$job_id" >"$file" || fail "$file cannot be written to; give another --run_dir"
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
        echo "slurm: job $job_id is done"
        exit 0
        ;;
    2)
        # Rank 0's log is shown above; if it has no error, show that of another rank.
        tail -n 20 -- "$logs/rank-000.log" | grep -q ': error: ' ||
            tail -q -n 20 -- "$logs"/rank-*.log | grep ': error: ' | sort -u | tail -n 3 >&2 || true
        # What started before may find a node at fault, such as one without the data.
        ((${SLURM_RESTART_COUNT:-0} > 0)) ||
            fail "job $job_id ended by a mistake that a restart would repeat; see $logs/rank-*.log"
        why="it ended by a mistake, though it had started before"
        ;;
    75) why="it was asked to stop, and has saved" ;;
    *) why="it ended with status $status" ;;
    esac
    if [[ $(newest_step "$run_dir") == "$started_from" ]] && ((restarts >= VLSCALE_MAX_RESTARTS)); then
        give_up "$logs" "$why"
    fi
    requeue "$run_dir" "$why" "$status"
}

give_up() {
    echo "slurm: error: job $job_id stops: $VLSCALE_MAX_RESTARTS restarts in a row brought it no further than step" \
        "$started_from; last, $2; see $1/rank-*.log" >&2
    exit 1
}

# Run a command of Slurm's, again for some minutes if it fails, as its controller may be restarting.
patiently() {
    local try
    for ((try = 1; try < 10; try++)); do
        "$@" && return
        sleep 20
    done
    "$@"
}

# Have Slurm start the job again, if it is a batch job that nobody cancelled.
requeue() {
    local run_dir=$1 why=$2 status=$3 job said
    job=$(patiently scontrol --oneliner show job "$job_id" 2>/dev/null) || job=
    if [[ -z $job ]]; then
        echo "slurm: error: $why; not requeued, as scontrol does not answer; submit it again, it goes on by itself" >&2
    elif [[ $job == *" BatchFlag=0"* ]]; then
        echo "slurm: $why; the same command goes on from step $(newest_step "$run_dir")"
    elif [[ $job != *" JobState=RUNNING"* ]]; then
        echo "slurm: $why; cancelled or out of time, so not requeued; submitted again, it goes on from the newest checkpoint"
    else
        # Said first: requeueing ends this script.
        echo "slurm: job $job_id: $why at step $(newest_step "$run_dir"); requeueing"
        said=$(patiently scontrol requeue "$job_id" 2>&1) && exit 0
        said=${said##*$'\n'}
        echo "slurm: error: the job cannot be requeued (${said:0:200}); submit it again, it goes on by itself" >&2
    fi
    exit "$status"
}
