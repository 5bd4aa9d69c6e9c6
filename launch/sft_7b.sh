#!/usr/bin/env bash
#SBATCH --job-name=megavl-sft_7b
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Stage 3 of the 7B model: supervised fine-tuning.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# A batch job runs a spooled copy of this file, from another folder.
[ -f "$here/launch.sh" ] || here=${SLURM_SUBMIT_DIR:?}/launch
. "$here/launch.sh"
launch sft_7b 7b/stage3.yaml 8
