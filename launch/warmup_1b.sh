#!/usr/bin/env bash
#SBATCH --job-name=megavl-warmup_1b
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
# Stage 1 of the 1.3B model: the adaptor learns to read SigLIP.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# A batch job runs a spooled copy of this file, from another folder.
[ -f "$here/launch.sh" ] || here=${SLURM_SUBMIT_DIR:?}/launch
. "$here/launch.sh"
launch warmup_1b 1b/stage1.yaml 4
