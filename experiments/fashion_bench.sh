#!/bin/bash
# The fashion bench: where the model has room, what gains on it, and every control (docs/evidence.md), by the configs of configs/fashion.
# The same command again goes on where it stopped. Which settings were tried before is in configs of their own, by one command each.
#   make bench       bash experiments/fashion_bench.sh             into runs/
#   make bench-quick bash experiments/fashion_bench.sh --quick     into runs/quick/: to see that it works; its figures say nothing
set -euo pipefail
configs=$PWD/configs/fashion out=. seeds="3 4 5" guide="--training.steps 1000 --training.compile"
if [ "${1:-}" = --quick ]; then
  out=runs/quick seeds=3 guide="--training.steps 25 --ddo.sampling.num_images 500"
elif [ $# -gt 0 ]; then
  echo "What is '$1'? The only option is --quick." >&2
  exit 2
fi
mkdir -p $out && cd $out

compare() { stagepatch compare --config "$configs/$1.yaml" "${@:2}"; }
guide() { # a LoRA by this preset or method, of a training seed
  stagepatch train --model fashion --data.source fashion "${@:2}" $guide --training.seed "$1"
}

compare room "$@"
compare weighting "$@"
compare recommended "$@"
compare experts_proof "$@"
compare loras_proof "$@"
for seed in $seeds; do
  guide $seed --preset guide --ddo.fakes runs/fashion-guide-fakes --output_dir runs/fashion-guide-$seed
  guide $seed --method lora --training.batch_size 128 --training.learning_rate 3e-3 --training.lr_scheduler linear \
    --training.ema_decay 0.998 --output_dir runs/fashion-guide-of-images-$seed
done
compare guide_proof "$@"
