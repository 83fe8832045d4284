#!/bin/bash
# DMP on DiTs of several widths and convergences, on averaged weights and on bare ones (docs/evidence.md, "The paper's claim").
# The same command again goes on where it stopped.
#   bash experiments/dmp_claim.sh WIDTH STEPS...       for w in 32 64; do bash experiments/dmp_claim.sh $w 10000 40000; done
set -euo pipefail
width=$1; shift
run=runs/w$width
last=$(printf '%s\n' "$@" | sort -n | tail -n 1)
[ -d "$run/snapshots/$(printf %07d "$last")" ] ||
  stagepatch pretrain --config configs/fashion/width.yaml --model.hidden_size "$width" --training.steps "$last" --output_dir "$run"

average() { # of the last COUNT snapshots up to STEPS, all alike
  local steps=$1 count=$2 output=$3 stages="" weights=""
  for ((i = 1; i < count; i++)); do
    stages+=",$run/snapshots/$(printf %07d $((steps - 500 * i)))"
    weights+=",$(python -c "print(1 / $count)")"
  done
  [ -d "$output" ] || stagepatch merge --base "$run/snapshots/$(printf %07d "$steps")" --stages "[${stages:1}]" \
    --weights "[${weights:1}]" --output_dir "$output"
}

for steps in "$@"; do
  average "$steps" 8 "$run/averaged-$steps"
  stagepatch compare --config configs/fashion/claim.yaml --model "$run/averaged-$steps" --output_dir "runs/claim-$width-averaged-$steps"
done
if [ "$width" = 64 ]; then # and on bare weights
  stagepatch compare --config configs/fashion/claim.yaml --model "$run/snapshots/$(printf %07d "$last")" \
    --output_dir "runs/claim-$width-bare-$last"
fi
