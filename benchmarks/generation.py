"""Generation with classifier-free guidance: patched over plain, and plain over diffusers' `DiTPipeline`.

    python benchmarks/generation.py [--hidden 384 --layers 12] [--images 2] [--steps 4] [--rounds 15]

The same weights in both models (`DiT.from_diffusers`), the same latents of 32×32×4, DDIM steps, guidance scale, batch
and VAE, which is tiny. A and B alternate in one process, see paired.py. What the gate takes is shown apart: a step's
samples share their timestep, so it could run once for all of them, for that over their number.
"""

from __future__ import annotations

import argparse
import statistics

import diffusers
import torch
from paired import paired, seconds
from torch import Tensor, nn

from stagepatch import DiT, Patch, SamplingConfig, generate

GUIDANCE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    torch.manual_seed(0)
    heads = arguments.hidden // 64
    theirs = diffusers.DiTTransformer2DModel(heads, 64, 4, 8, arguments.layers, sample_size=32).eval()
    for block in theirs.transformer_blocks:  # as in the released checkpoints
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipe = diffusers.DiTPipeline(theirs, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    model = DiT.from_diffusers(theirs).requires_grad_(False)
    patch = Patch.create(model).eval()
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.02)
    patch.attach(model)
    labels = torch.arange(arguments.images)
    config = SamplingConfig("ddim", arguments.steps, GUIDANCE, num_images=arguments.images)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents / vae.config.scaling_factor).sample

    def ours(enabled: bool) -> None:
        patch.enabled = enabled
        generate(model, pipe.scheduler, config, labels, decode=decode)

    def by_pipeline() -> None:
        pipe(labels.tolist(), GUIDANCE, num_inference_steps=arguments.steps, output_type="pt")

    of_patch = paired(lambda: ours(True), lambda: ours(False), arguments.rounds)
    print(f"patched / plain: {of_patch}", flush=True)
    condition = torch.randn(2 * arguments.images, arguments.hidden)
    gate = seconds(lambda: [patch.observe(condition) for _ in range(100)]) / 100
    share = gate * arguments.steps / statistics.median(of_patch.second)
    print(f"the gate, once a step for all blocks, of every sample apart: {100 * share:.3f} % of plain", flush=True)
    print(f"plain / DiTPipeline: {paired(lambda: ours(False), by_pipeline, arguments.rounds)}", flush=True)


if __name__ == "__main__":
    main()
