#!/usr/bin/env bash
# DeMe on digits, three training seeds: decouple, merge with equal weights and by search, compare. Some 1.5 h on 2 cores. Resumes.
# For the U-Net: MODEL=unet bash experiments/deme.sh, after stagepatch pretrain --config configs/digits/pretrain-unet.yaml
set -euo pipefail
suffix=${MODEL:+-$MODEL}
for seed in 0 1 2; do
  stages=runs/digits$suffix-decouple-$seed
  stagepatch decouple --config "configs/digits/decouple$suffix.yaml" --training.seed "$seed" --output_dir "$stages"
  stagepatch decouple --config "configs/digits/decouple$suffix.yaml" --training.seed "$seed" --num_stages 1 \
    --output_dir "runs/digits$suffix-one-$seed"
  if [ -n "$suffix" ]; then
    stagepatch decouple --config "configs/digits/decouple$suffix.yaml" --training.seed "$seed" --method dmp \
      --training.learning_rate 1e-2 --output_dir "runs/digits$suffix-patches-$seed"
  fi
  merge=(stagepatch merge --config "configs/digits/merge$suffix.yaml" --stages "['$stages']")
  "${merge[@]}" --search.strategies '[]' --weights '[0.25, 0.25, 0.25, 0.25]' --output_dir "runs/digits$suffix-mean-$seed"
  "${merge[@]}" --search.strategies '[grid]' --output_dir "runs/digits$suffix-grid-$seed"
  "${merge[@]}" --search.strategies '[tpe, cma]' --output_dir "runs/digits$suffix-optuna-$seed"
done
stagepatch compare --config "configs/digits/deme$suffix.yaml"
