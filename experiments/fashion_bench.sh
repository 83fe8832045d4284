#!/bin/bash
# The fashion bench: where the model has room, what gains on it, and every control (docs/evidence.md), by the configs of configs/fashion.
# The same command again goes on where it stopped. Which settings were tried before is in configs of their own, by one command each.
#   make bench       bash experiments/fashion_bench.sh             into runs/
#   make bench-quick bash experiments/fashion_bench.sh --quick     into runs/…-quick: to see that it works; its figures say nothing
set -euo pipefail
if [ $# -gt 0 ] && [ "$*" != --quick ]; then
  echo "What is '$*'? The only option is --quick." >&2
  exit 2
fi
for table in room weighting recommended experts_proof loras_proof guide_proof; do
  stagepatch compare --config configs/fashion/$table.yaml "$@"
done
