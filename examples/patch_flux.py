"""A small patch for FLUX.1: 16×16 prompts a block for any image size, about 0.4% of the model.

    python examples/patch_flux.py --images IMAGES --output runs/flux

The frozen transformer is kept in bfloat16; what is learned is float32.
"""

import argparse
from pathlib import Path

import torch

from stagepatch import PatchConfig
from stagepatch.checkpoints import load_denoiser
from stagepatch.data import CachedLatents, DataConfig, make_cache
from stagepatch.diffusion import Objective
from stagepatch.methods import DMP
from stagepatch.training import TrainingConfig, train

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--images", required=True, help="folder with metadata.jsonl")
parser.add_argument("--output", type=Path, default=Path("runs/flux"))
parser.add_argument("--image_size", type=int, default=1024)
parser.add_argument("--bucket_step", type=int, default=64)
parser.add_argument("--steps", type=int, default=5_000)
parser.add_argument("--batch_size", type=int, default=16)
arguments = parser.parse_args()

# Images keep their shapes: a batch is of one, a run of many.
data = DataConfig(
    source=arguments.images,
    image_size=arguments.image_size,
    crop="buckets",
    bucket_step=arguments.bucket_step,
)
make_cache(arguments.output / "cache", arguments.model, data, batch_size=1, dtype=torch.bfloat16)
dataset = CachedLatents(arguments.output / "cache")

transformer, scheduler = load_denoiser(arguments.model)
transformer.to(torch.bfloat16).enable_gradient_checkpointing()
latents = arguments.image_size // 8
method = DMP(PatchConfig(sample_size=latents, grid=[16, 16]), facts={"data": arguments.images})
config = TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size, max_grad_norm=1.0)
train(transformer, method, Objective(scheduler), dataset, config, arguments.output)

share = method.patch.num_parameters() / sum(parameter.numel() for parameter in transformer.parameters())
print(f"The patch is in '{arguments.output}': {method.patch.num_parameters():,} parameters, {share:.2%} of the model.")
