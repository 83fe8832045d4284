"""Sample from SDXL with a patch, at any size, beside the base model from the same noise.

python examples/sample_sdxl.py --patch runs/sdxl --prompt "an old house" --height 1024 --width 768
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stagepatch import Patch

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--patch", required=True, help="directory or Hub id")
parser.add_argument("--prompt", default="an old house")
parser.add_argument("--height", type=int, default=1024)
parser.add_argument("--width", type=int, default=1024)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", type=Path, default=Path("runs/sdxl-samples"))
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.float16 if has_gpu else torch.float32)
if has_gpu:
    pipe.enable_model_cpu_offload()

patch = Patch.from_pretrained(arguments.patch)
patch.attach(pipe)  # prompts follow the size of the images, whatever it was in training
arguments.output.mkdir(parents=True, exist_ok=True)
for name, enabled in (("base", False), ("patched", True)):
    patch.enabled = enabled
    image = pipe(
        arguments.prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(arguments.output / f"{name}.png")
print(f"base.png and patched.png, from the same noise, are in '{arguments.output}'.")
