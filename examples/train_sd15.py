"""Train a patch for Stable Diffusion 1.5 on captioned images, and look at it.

    python examples/train_sd15.py --images IMAGES --output runs/sd15

IMAGES is a folder with a metadata.jsonl of {"file_name": ..., "text": ...} lines. On several GPUs, start it with
`accelerate launch`. The same in one command: `stagepatch train --model ... --data.source IMAGES`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stagepatch import DataConfig, Patch, Run, TrainConfig, TrainingConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--images", required=True)
parser.add_argument("--output", type=Path, default=Path("runs/sd15"))
parser.add_argument("--image_size", type=int, default=512)
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--batch_size", type=int, default=128)
parser.add_argument("--prompt", default="a photo of a cat")
arguments = parser.parse_args()

# Images and captions are encoded once; then neither VAE nor text encoder is needed.
config = TrainConfig(
    output_dir=str(arguments.output),
    model=arguments.model,
    data=DataConfig(source=arguments.images, image_size=arguments.image_size, horizontal_flip=True),
    training=TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size),
)
Run(config).train()

# The patch goes on the pipeline as people use it.
pipe = DiffusionPipeline.from_pretrained(arguments.model)
patch = Patch.from_pretrained(arguments.output)
patch.attach(pipe)
size = {"height": arguments.image_size, "width": arguments.image_size}
for name, scale in (("base", 0.0), ("patched", 1.0)):
    patch.scale = scale
    image = pipe(arguments.prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=50, **size).images[
        0
    ]
    image.save(arguments.output / f"{name}.png")
print(f"The patch is in '{arguments.output}', with base.png and patched.png from the same noise.")
