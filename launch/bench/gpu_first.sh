#!/usr/bin/env bash
# The most telling part of gpu.sh in 8 minutes, for a GPU that is lent for a quarter of an hour: ceilings, CUDA against
# the CPU, the 1.3B against transformers and with recompute, and a stage of the 7B. gpu_rest.sh adds the rest to the same
# report, which is written after every case. Arguments go to step.py.
exec timeout 480 bash "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" --set first --steps 12 --limit 150 "$@"
