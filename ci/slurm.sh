#!/usr/bin/env bash
#SBATCH --job-name=fusecheck
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus=2
#SBATCH --time=00:30:00
#SBATCH --output=fusecheck-%j.log
# The GPU job for Slurm. Usage, from the checkout: sbatch ci/slurm.sh; other sizes: sbatch --gpus=8 ci/slurm.sh
# Slurm runs a copy of this file, so the checkout is where sbatch was called.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ ! -x ci/mpirun.sh ]; then
    echo "ci/slurm.sh: no ci/mpirun.sh here; call sbatch from the checkout" >&2
    exit 2
fi
export PYTHON=${PYTHON:-.venv/bin/python}
exec ci/mpirun.sh "${RANKS:-${SLURM_GPUS:-2}}" "${OUT:-runs/slurm-${SLURM_JOB_ID:-local}}"
