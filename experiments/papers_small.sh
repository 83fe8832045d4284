#!/bin/bash
# Every table of DMP and the steps of DeMe (docs/papers.md), small: by the papers' own configs, on Fashion-MNIST at 16x16, from
# pretraining its bases. It shows that a command runs and what it prints; at this size no figure says anything of a method.
# The same command again goes on where it stopped; names of tables, such as table4a-gate, take these alone.
#   make papers-small       bash experiments/papers_small.sh [TABLE...]
set -euo pipefail
steps=${STEPS:-200} images=${IMAGES:-1000} out=runs/papers-small
shared="--data.source fashion --data.num_workers 0 --data.horizontal_flip true"

stagepatch pretrain --config configs/fashion/pretrain.yaml --training.steps $((steps * 10)) --training.compile false \
  --training.snapshot_every 0 --training.label_dropout 0.1 --output_dir $out/dit
stagepatch pretrain --model.sample_size 16 --model.in_channels 1 --model.conditioning none --model.learn_sigma false \
  --model.block_out_channels '[32,64]' --objective.beta_schedule scaled_linear --objective.clip_sample true $shared \
  --training.steps $((steps * 2)) --training.batch_size 64 --training.learning_rate 1e-3 --output_dir $out/unet

table() { # by its config, on a base
  stagepatch compare --config "configs/paper/$1.yaml" --model "$2" $shared --extractor fashion --metric fid_held_out \
    --training.steps "$steps" --training.batch_size 64 --training.mixed_precision no --evaluate_every "$steps" \
    --sampling.num_images "$images" --sampling.num_inference_steps 25 --sampling.batch_size 500 --launch.workers 2 \
    --output_dir "$out/$1" "${@:3}"
}
if [ $# -eq 0 ]; then
  set -- $(cd configs/paper && ls *.yaml | sed 's/\.yaml//') deme
fi
for name in "$@"; do
  case $name in
    table2-sd15) table "$name" $out/unet --sampling.guidance_scale 1 ;; # a U-Net, without text
    deme)
      stagepatch decouple --model $out/dit $shared --training.steps "$steps" --training.batch_size 64 \
        --training.learning_rate 3e-4 --output_dir $out/deme
      stagepatch merge --base $out/dit --stages "[$out/deme]" --weights '[0.25,0.25,0.25,0.25]' --output_dir $out/merged
      stagepatch evaluate --model $out/merged --data.source fashion --extractor fashion --sampling.num_images "$images" \
        --output_dir $out/evaluated
      stagepatch analyze --model $out/dit $shared --stages "[$out/deme]" --samples 32 --output_dir $out/analyzed
      ;;
    *) table "$name" $out/dit ;;
  esac
done
