#!/bin/bash
# A run under slurm that outlives its time limit: sbatch docs/jobs/slurm.sh --model qwen-3b --steps 500
#
# Three minutes before the limit slurm sends SIGTERM to the training, which drops the step in progress, saves and exits
# 0; the job then goes back into the queue and resumes. A preempted job does the same, for --requeue. What is typed
# behind the file's name goes to train_azr.py.
#SBATCH --job-name=azr
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=azr-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

run=${AZR_RUN:-runs/slurm-$SLURM_JOB_ID} # on a disk that the next node sees too
srun python train_azr.py "$@" --out "$run" --resume auto

# Exit code 0 means done or stopped with a checkpoint; the checkpoint of the last step tells which. An error has ended
# this script above (set -e), so a run that gave up does not go round in circles.
steps=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["steps"])' "$run/config.json")
if [ -d "$run/checkpoints/step_$steps" ]; then
    echo "all $steps steps are done: $run"
else
    scontrol requeue "$SLURM_JOB_ID"
fi
