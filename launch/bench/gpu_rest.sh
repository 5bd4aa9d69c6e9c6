#!/usr/bin/env bash
# What gpu_first.sh leaves out of gpu.sh, added to its report. Arguments go to step.py.
exec bash "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" --set rest --steps 12 --limit 150 "$@"
