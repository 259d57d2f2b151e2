#!/usr/bin/env bash
# Run this on every machine, with the same values; to continue: torchrun.sh --resume. Change here or in the environment:
# HOST (one of the machines, by a name that all can reach), how many machines, how many cards each has, the folder that
# all machines see, with support.yaml in it, and where lorasft is installed.
set -euo pipefail

HOST=${HOST:-node1}
MACHINES=${MACHINES:-2}
CARDS=${CARDS:-8}

cd "${FOLDER:-/shared/support}"
export PATH="${LORASFT:-/opt/lorasft}/bin:$PATH"

exec torchrun \
    --nnodes "$MACHINES" \
    --nproc-per-node "$CARDS" \
    --max-restarts 0 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HOST:29500" \
    --rdzv-id support \
    -m lorasft train support.yaml "$@"
