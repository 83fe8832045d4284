#!/usr/bin/env bash
# DeMe on digits, three training seeds: decouple, search the weights, compare. Some 1.5 h on 2 idle cores; resumes.
# For the U-Net: MODEL=unet bash experiments/deme.sh, after stagepatch pretrain --config configs/digits/pretrain-unet.yaml
set -euo pipefail
suffix=${MODEL:+-$MODEL}
for seed in 0 1 2; do
  stages=runs/digits$suffix-decouple-$seed
  stagepatch decouple --config "configs/digits/decouple$suffix.yaml" --training.seed "$seed" --output_dir "$stages"
  for strategies in grid tpe,cma; do
    output=runs/digits$suffix-$([ $strategies = grid ] && echo grid || echo optuna)-$seed
    stagepatch merge --config "configs/digits/merge$suffix.yaml" --stages "['$stages']" \
      --search.strategies "[$strategies]" --output_dir "$output"
  done
done
stagepatch compare --config "configs/digits/deme$suffix.yaml"
