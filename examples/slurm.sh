#!/usr/bin/env bash
# The main job on several nodes of a Slurm cluster: one torchrun agent a node, started again from the newest checkpoint.
#
#   cd CHECKOUT; sbatch --nodes 4 examples/slurm.sh [--config-name NAME] [key=value ...]
#
# The checkout, the model, the data and the output lie on storage that all nodes share. Settings, as variables:
#
#   MPO_OUTPUT     folder of the run                       (experiments/<job name>)
#   MPO_PYTHON     Python with the package                 (.venv/bin/python of the checkout; python in a container)
#   MPO_RANKS      ranks a node                            (its GPUs)
#   MPO_IMAGE      container image, for pyxis and enroot   (none)
#   MPO_MOUNTS     what the container sees, beside the checkout and the output: HOST:CONTAINER[,...]
#   MPO_CACHE      tokenised data and reference            (experiments/cache)
#   MPO_RESTARTS   starts after failures, at most          (10)
#
# docs/launch.md says what each setting below is for.
#SBATCH --job-name=mpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120
set -euo pipefail

die() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script; start it with sbatch --nodes N examples/slurm.sh"
# Slurm runs a copy of this file.
root=${SLURM_SUBMIT_DIR:-$PWD}
[[ -f $root/examples/mpo_gpt.py ]] || die "$root has no examples/mpo_gpt.py; run sbatch in the checkout"
output=${MPO_OUTPUT:-$root/experiments/${SLURM_JOB_NAME:-mpo}}
ranks=${MPO_RANKS:-${SLURM_GPUS_ON_NODE:-}}
[[ -n $ranks ]] || die "Slurm gave this job no GPUs; add --gpus-per-node, or set MPO_RANKS for ranks on CPUs"
cache=${MPO_CACHE:-$root/experiments/cache}
restarts=${SLURM_RESTART_COUNT:-0}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=${SLURM_JOB_NUM_NODES:-${#hosts[@]}}
((${#hosts[@]} == nodes)) || die "$SLURM_JOB_NODELIST are ${#hosts[@]} nodes, and the job has $nodes"

# Before Blackwell, overlap of tensor- and context-parallel communication needs kernels in the order of their launch.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || capability=
if [[ $capability =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] < 10)); then
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi
# Rows have another length at every step.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# A rank whose collective has failed or hangs (trainer.distributed_timeout_minutes) ends, and with it the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}

step_options=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
if [[ -n ${MPO_IMAGE:-} ]]; then
    mkdir -p "$output" "$cache"
    step_options+=(
        --container-image="$MPO_IMAGE"
        --container-mounts="$root:$root,$output:$output,$cache:$cache${MPO_MOUNTS:+,$MPO_MOUNTS}"
        --container-workdir="$root"
        --no-container-mount-home
    )
    python=${MPO_PYTHON:-python}
    # The checkout's own package, not the image's copy of it.
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
else
    python=${MPO_PYTHON:-$root/.venv/bin/python}
fi

# A port that jobs on the same node do not share, and a meeting of this start alone.
agent=(
    "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks"
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"
    --rdzv-id "$SLURM_JOB_ID-$restarts"
)
job=("$root/examples/mpo_gpt.py" exp_manager.resume_if_exists=true exp_manager.explicit_log_dir="$output"
    model.data.cache_dir="$cache" "$@")

checkpoints() { find "$output/checkpoints" -mindepth 1 -maxdepth 1 -name 'step_*' 2>/dev/null | sort || true; }

# Starts the job again, if this start has come to a new checkpoint: what fails at the same place would fail for ever.
again() {
    [[ -z $asked ]] || return 0
    asked=yes
    if ((restarts >= ${MPO_RESTARTS:-10})); then
        printf 'slurm.sh: %s; not started again after %d restarts\n' "$1" "$restarts"
    elif [[ $(checkpoints) == "$before" ]]; then
        printf 'slurm.sh: %s; not started again, since there is no new checkpoint\n' "$1"
    else
        printf 'slurm.sh: %s; started again from the newest checkpoint\n' "$1"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

before=$(checkpoints)
asked=
printf 'slurm.sh: %d nodes x %d ranks, start %d, %s\n' "$nodes" "$ranks" "$((restarts + 1))" "${hosts[*]}"
cd "$root"
srun "${step_options[@]}" "${agent[@]}" "${job[@]}" &
step=$!
trap 'again "the time is up"' USR1
while :; do
    status=0
    wait "$step" || status=$?
    # The signal ends the wait, and not the step.
    { ((status > 128)) && kill -0 "$step" 2>/dev/null; } || break
done
((status == 0)) || again "the job has failed with status $status"
exit "$status"
