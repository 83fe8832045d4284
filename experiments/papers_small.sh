#!/bin/bash
# Every table of DMP, and DeMe's study and figures (docs/papers.md), small: by the papers' own configs, on Fashion-MNIST at 16x16, from
# pretraining its bases. It shows that a command runs and what it prints; at this size no figure says anything of a method.
# The same command again goes on where it stopped; names of tables, such as table4a-gate, take these alone.
#   make papers-small       bash experiments/papers_small.sh [TABLE...]
set -euo pipefail
steps=${STEPS:-100} images=${IMAGES:-500} out=runs/papers-small
shared="--data.source fashion --data.num_workers 0 --data.horizontal_flip true"

stagepatch pretrain --config configs/fashion/pretrain.yaml --training.steps $((steps * 10)) --training.compile false \
  --training.snapshot_every 0 --training.label_dropout 0.1 --output_dir $out/dit
stagepatch pretrain --model.sample_size 16 --model.in_channels 1 --model.conditioning none --model.learn_sigma false \
  --model.block_out_channels '[16,32]' --objective.beta_schedule scaled_linear --objective.clip_sample true $shared \
  --training.steps $((steps * 2)) --training.batch_size 64 --training.learning_rate 1e-3 --output_dir $out/unet

table() { # by its config, on a base
  stagepatch compare --config "configs/paper/$1.yaml" --model "$2" $shared --extractor fashion --metric fid_held_out \
    --training.steps "$steps" --training.batch_size 64 --training.mixed_precision no --evaluate_every "$steps" \
    --sampling.num_images "$images" --sampling.num_inference_steps 25 --sampling.batch_size 500 --launch.workers 2 \
    --output_dir "$out/$1" "${@:3}"
}
if [ $# -eq 0 ]; then
  set -- $(cd configs/paper && ls *.yaml | sed 's/\.yaml//') params gate deme
fi
for name in "$@"; do
  case $name in
    table2-sd15) table "$name" $out/unet --sampling.guidance_scale 1 ;; # a U-Net, without text
    table6-scratch) # of a model as it was drawn
      stagepatch pretrain --config configs/fashion/pretrain.yaml --training.steps 0 --training.label_dropout 0.1 --output_dir $out/drawn
      table "$name" $out/drawn
      ;;
    params) stagepatch params ;; # Table 1
    gate) # Fig. 5 and 7, Table 5, figures of samples
      stagepatch train --model $out/dit $shared --training.steps "$steps" --training.batch_size 64 --output_dir $out/patch
      stagepatch analyze --model $out/dit $shared --gradients false --losses false --patch $out/patch --gate_timesteps 100 \
        --structure_samples $((images / 2)) --output_dir $out/gate
      for sees in "" "--patch $out/patch"; do
        stagepatch sample --model $out/dit --classes '[2,7,9]' --sampling.num_images 24 --sampling.num_inference_steps 25 $sees \
          --output_dir "$out/samples${sees:+-patched}"
      done
      ;;
    deme) # by the configs of CIFAR-10: Fig. 2's sweep of N with the control beside it, then Fig. 1's task vectors and gradients
      folder=configs/paper/deme-cifar10 training="--training.steps $steps --training.batch_size 64" few="--sampling.num_inference_steps 10"
      stagepatch pretrain --config configs/paper/pretrain/ddpm-cifar10.yaml --model.sample_size 16 --model.in_channels 1 \
        --model.block_out_channels '[16,32]' $shared --training.steps $((steps * 2)) --training.batch_size 64 \
        --training.learning_rate 1e-3 --training.warmup_steps 0 --training.ema_decay 0.99 --output_dir $out/ddpm
      python experiments/deme.py $folder --num_stages 2 4 --model $out/ddpm --output_dir $out/deme --all "$shared" \
        --decouple "$training --launch.workers 2" \
        --merge "--extractor fashion --search.coarse [0,0.5] --search.fine [0,0.25] --sampling.num_images $((images / 5)) $few" \
        --compare "--extractor fashion --metric fid_held_out --sampling.num_images $images $few --launch.workers 2"
      stagepatch analyze --model $out/ddpm $shared --stages "[$out/deme/seed-0/n4-p0.4]" --gradients false --losses false \
        --output_dir $out/task-vectors
      stagepatch train --config $folder/finetune.yaml --model $out/ddpm $shared $training --training.snapshot_every $((steps / 2)) \
        --output_dir $out/finetune
      stagepatch analyze --config $folder/analyze.yaml --model $out/ddpm $shared --snapshots $out/finetune --timesteps 20 \
        --samples 32 --projection 4096 --output_dir $out/gradients
      ;;
    *) table "$name" $out/dit ;;
  esac
done
