"""Peak memory of training a patch on a large frozen base in bfloat16, against the base's own bytes.

    python benchmarks/memory.py [--hidden 3072 --layers 3 --batch 4] [--held torchao_int8]

A DiT of few, wide blocks with random weights is written, and a process of its own trains a patch on it for two steps
with gradient checkpointing. Its peak resident memory is counted from after the same on a tiny model, so that libraries
are not counted. With `--held`, a quantisation or 'layerwise_casting', also what of it is held once it is loaded.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stagepatch import DiT, Run, TrainConfig, TrainingConfig
from stagepatch.checkpoints import MemoryConfig, load_denoiser, save_denoiser
from stagepatch.data import DataConfig
from stagepatch.diffusion import ObjectiveConfig, make_scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--method", default="dmp")
    parser.add_argument("--held", default="none", help="memory.quantization, or 'layerwise_casting'")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        own = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", write(Path(directory), arguments)])
    sys.exit(own.returncode)


def write(directory: Path, arguments: argparse.Namespace) -> str:
    """A tiny base and a large one, for images of digits' size."""
    for name, hidden, layers in (("tiny", 64, 1), ("large", arguments.hidden, arguments.layers)):
        with torch.device("meta"):
            model = DiT(8, 2, 1, hidden, layers, 16, num_classes=10, learn_sigma=False)
        model = model.to_empty(device="cpu").bfloat16()
        for value in (*model.parameters(), *model.buffers()):
            value.data.normal_(std=0.02)
        save_denoiser(model, make_scheduler(ObjectiveConfig()), directory / name)
    return str(directory)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    train(directory, "tiny", arguments)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(directory, "large", arguments)
    peak = resident("VmHWM") - before
    model, _ = load_denoiser(directory / "large", torch.bfloat16)
    base = sum(value.numel() * value.element_size() for value in model.parameters())
    block = saved_by_a_block(model, arguments.batch)
    count = sum(value.numel() for value in model.parameters())
    sizes = f"{base / 1e6:,.0f} MB in bfloat16; activations of one block {block / 1e6:,.1f} MB"
    held, _ = load_denoiser(directory / "large", torch.bfloat16, memory=memory_of(arguments))
    kept = sum(held_bytes(value) for value in held.parameters())
    print(f"base: {count:,} parameters, {sizes}")
    print(f"held as {arguments.held}: {kept / 1e6:,.0f} MB = {kept / base:.3f} × the base")
    print(f"peak of training: {peak / 1e6:,.0f} MB = {(peak - block) / base:.3f} × the base + one block's activations")


def train(directory: Path, name: str, arguments: argparse.Namespace) -> None:
    training = TrainingConfig(
        steps=2, batch_size=arguments.batch, log_every=1, gradient_checkpointing=True, tensorboard=False
    )
    config = TrainConfig(
        model=str(directory / name),
        dtype="bfloat16",
        memory=memory_of(arguments),
        output_dir=str(directory / f"{name}-run"),
        method=arguments.method,
        data=DataConfig(source="digits"),
        training=training,
    )
    Run(config).train(progress=False)


def memory_of(arguments: argparse.Namespace) -> MemoryConfig:
    """What `--held` says."""
    if arguments.held == "layerwise_casting":
        return MemoryConfig(layerwise_casting=True)
    return MemoryConfig(quantization=arguments.held)


def held_bytes(value: torch.Tensor) -> int:
    """Of a tensor, or of those that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(value):
        return value.numel() * value.element_size()
    return sum(held_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])


def saved_by_a_block(model: DiT, batch: int) -> int:
    """Bytes that autograd keeps of one block's forward, besides its weights."""
    kept: dict[int, int] = {}
    weights = {value.data_ptr() for value in model.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() not in weights:
            kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    hidden = model.config.hidden_size
    tokens = torch.randn(batch, 16, hidden, dtype=torch.bfloat16, requires_grad=True)
    condition = torch.randn(batch, hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model.blocks[0](tokens, condition, (4, 4))
    return sum(kept.values())


def resident(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
