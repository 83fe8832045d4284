"""A small patch for FLUX.1: 16×16 prompts a block for any image size, about 0.4% of the model.

    python examples/patch_flux.py --images IMAGES --output runs/flux

The frozen transformer is kept in bfloat16; what is learned is float32.
"""

import argparse
from pathlib import Path

from stagepatch import DataConfig, PatchConfig, Run, TrainConfig, TrainingConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--images", required=True, help="folder with metadata.jsonl")
parser.add_argument("--output", type=Path, default=Path("runs/flux"))
parser.add_argument("--image_size", type=int, default=1024)
parser.add_argument("--bucket_step", type=int, default=64)
parser.add_argument("--steps", type=int, default=5_000)
parser.add_argument("--batch_size", type=int, default=16)
arguments = parser.parse_args()

config = TrainConfig(
    output_dir=str(arguments.output),
    model=arguments.model,
    dtype="bfloat16",
    cache_batch_size=1,
    patch=PatchConfig(sample_size=arguments.image_size // 8, grid=[16, 16]),
    # Images keep their shapes: a batch is of one, a run of many.
    data=DataConfig(
        source=arguments.images,
        image_size=arguments.image_size,
        crop="buckets",
        bucket_step=arguments.bucket_step,
    ),
    training=TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size, max_grad_norm=1.0),
)
run = Run(config)
run.model.enable_gradient_checkpointing()
patch = run.train().patch

share = patch.num_parameters() / sum(parameter.numel() for parameter in run.model.parameters())
print(f"The patch is in '{arguments.output}': {patch.num_parameters():,} parameters, {share:.2%} of the model.")
