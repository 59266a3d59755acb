# shellcheck shell=bash
# Functions for the sbatch files, which source this file in the root of the checkout, on the first node of the job. The
# settings of a site are in env.sh.

if [[ -z "${SLURM_JOB_ID:-}" && -z "${DRY_RUN:-}" ]]; then
    echo "submit this file as its first lines say: sbatch ... $0 (DRY_RUN=1 only prints the command)" >&2
    exit 2
fi
export COUPALIGN_ROOT=$PWD
# shellcheck source=slurm/env.sh
source "${COUPALIGN_ENV:-slurm/env.sh}"

# The ranks meet on the first node.
if [[ -z "${MASTER_ADDR:-}" ]]; then
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    MASTER_ADDR=${nodes[0]:-127.0.0.1}
fi
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since Slurm 22.05 srun does not inherit this from sbatch.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# step "SRUN OPTIONS" VERB ARGUMENTS...: run a verb of coupalign as a step of the job. With DRY_RUN, only print it.
step() {
    local options
    read -r -a options <<<"$1"
    shift
    local command=(srun "${options[@]}" ${COUPALIGN_SRUN[@]+"${COUPALIGN_SRUN[@]}"}
        ${COUPALIGN_CONTAINER[@]+"${COUPALIGN_CONTAINER[@]}"} python -m coupalign "$@")
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}"
}

# all_ranks "SRUN OPTIONS" VERB ARGUMENTS...: the same on all nodes and tasks of the job.
all_ranks() {
    step "--nodes ${SLURM_JOB_NUM_NODES:-1} --ntasks ${SLURM_NTASKS:-1} $1" "${@:2}"
}

# stoppable VERB ARGUMENTS...: run train or eval. If it was asked to stop (status 75), queue the job again to resume it.
stoppable() {
    local status=0 job=${SLURM_JOB_ID:-}
    # An array's own number is also that of its last task. Only this form names a single task.
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # When a task ends, give the others two minutes. Killing them at once would hide status 75.
    all_ranks "--kill-on-bad-exit=0 --wait=120" "$@" || status=$?
    case $status in
        75)
            echo "stopped before the end: queued again"
            local tries=0
            # A busy controller sometimes does not answer. When it does, it ends this script together with the job.
            until scontrol requeue "$job" || ((++tries == 5)); do sleep 10; done
            ;;
        70)
            echo "a hang was found and ended: not queued again, since it may happen again;" \
                "the stacks of the ranks are above" >&2
            ;;
    esac
    return "$status"
}
