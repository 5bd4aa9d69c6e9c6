#!/usr/bin/env bash
# Measures on one GPU: CUDA against the CPU, the device's ceilings, and training steps against transformers and
# megatron-core's stock attention. Writes a report to launch/bench/results. Without a GPU the tiny version of every part
# runs, and the report says so. Arguments go to step.py.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no GPU here. The tiny version of every part runs on the CPU; full-size columns stay empty, and the" \
    "tests of CUDA against the CPU (tests/numerics/test_cuda.py) are left out."
fi
exec "$PYTHON" -m launch.bench.step "$@"
