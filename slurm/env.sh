# shellcheck shell=bash
# The settings of your site: edit this file once. The sbatch files read it on the first node of a job. To use its
# SBATCH_* defaults, also read it in your shell before sbatch (`source slurm/env.sh`). COUPALIGN_ENV=FILE names another
# file.

# Defaults for sbatch.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_TIMELIMIT=24:00:00

# Software: load modules, then activate the environment with coupalign.
# module load cuda/13.0
if [[ -z "${VIRTUAL_ENV:-}" && -r "${COUPALIGN_ROOT:-.}/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "${COUPALIGN_ROOT:-.}/.venv/bin/activate"
fi

# Container: what to write in front of python on every node.
COUPALIGN_CONTAINER=()
# COUPALIGN_CONTAINER=(apptainer exec --nv "$HOME/coupalign.sif")

# More options for srun.
COUPALIGN_SRUN=()
# COUPALIGN_SRUN=(--mpi=none)

# Network: the interface between the nodes. If it is not set, gloo may advertise 127.0.0.1, and the job hangs at its
# start.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# If node names do not resolve, set the address of the first node. If the port from the job id is taken, set another.
# export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500

# Scratch on the node: torch, triton and DeepSpeed build their extensions there.
# export TMPDIR=/scratch/$USER
# Nodes without internet: the folder of the hub's files, and no attempt to download.
# export HF_HOME=/shared/hub HF_HUB_OFFLINE=1
# Tracking server.
# export MLFLOW_TRACKING_URI=http://tracker:5000
