#!/usr/bin/env bash
# Run this on every machine with its number: accelerate.sh 0 on HOST, accelerate.sh 1 on the next, ...; to continue:
# accelerate.sh 0 --resume, ... Change here or in the environment: HOST (machine 0), how many machines, how many cards
# each has, the folder that all machines see, with support.yaml in it, and where lorasft is installed.
set -euo pipefail

NUMBER=${1:?the number of this machine, from 0}
shift
HOST=${HOST:-node1}
MACHINES=${MACHINES:-2}
CARDS=${CARDS:-8}

cd "${FOLDER:-/shared/support}"
export PATH="${LORASFT:-/opt/lorasft}/bin:$PATH"

exec accelerate launch \
    --multi_gpu \
    --num_machines "$MACHINES" \
    --num_processes "$((MACHINES * CARDS))" \
    --machine_rank "$NUMBER" \
    --main_process_ip "$HOST" \
    --main_process_port 29500 \
    --max_restarts 0 \
    --mixed_precision no \
    --dynamo_backend no \
    -m lorasft train support.yaml "$@"
