"""What short runs of the commands write, as hashes: `python -m tests.golden.record` keeps them in golden.json.

A hash is of bits, which another processor may round otherwise: each has hashes of its own, and where it has none sums
are compared alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stagepatch.cli import main

GOLDEN = Path(__file__).parent / "golden.json"
# What says how long a run took or where it lay, and what a run is told of settings (which may gain fields).
_VARYING = {"images_per_second", "seconds", "seconds_per_step", "peak_memory", "file_size", "identity", "environment"}
_TRAINING = ["--training.batch_size=8", "--training.log_every=1", "--training.tensorboard=false"]
_METHODS = {
    "dmp": [],
    "dmp-sets": ["--method=dmp", "--patch.num_experts=3", "--patch.condition=t+c"],
    "prompt_tuning": ["--method=prompt_tuning"],
    "finetune": ["--method=finetune", "--training.ema_decay=0.9"],
    "bitfit": ["--method=bitfit"],
    "lora": ["--method=lora", "--lora.rank=4"],
    "t-lora": ["--method=lora", "--lora.rank=4", "--lora.min_rank=1"],
}


def environment() -> dict[str, str]:
    """Where bits can be expected to be the same."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def record(directory: Path) -> dict[str, Any]:
    """Run everything in an empty directory; what each file there holds, by its path."""
    with _in(directory):
        for arguments in _commands():
            if main(arguments) != 0:
                raise AssertionError(f"stagepatch {' '.join(arguments)} failed")
        return {str(path): facts for path in sorted(Path().rglob("*")) if (facts := _facts(path)) is not None}


@contextlib.contextmanager
def _in(directory: Path) -> Iterator[None]:
    before, threads, state = Path.cwd(), torch.get_num_threads(), torch.get_rng_state()
    os.chdir(directory)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        os.chdir(before)


def _commands() -> Iterator[list[str]]:
    """Each is asked for when those before it are done."""
    model = ["--model.sample_size=8", "--model.in_channels=1", "--model.hidden_size=16", "--model.num_layers=2"]
    model += ["--model.num_attention_heads=2", "--model.num_classes=10"]
    yield ["pretrain", "--output_dir=pretrain", "--training.steps=3", *model, *_TRAINING]
    for name, options in _METHODS.items():
        yield ["train", f"--output_dir={name}", "--training.steps=3", *options, *_TRAINING]
    sampling = ["--sampling.num_inference_steps=3", "--sampling.num_images=6"]
    for name in ("dmp", "finetune", "t-lora"):
        yield ["sample", f"--output_dir=sample-{name}", f"--patch={name}", *sampling]
    yield ["evaluate", "--output_dir=evaluate", "--patch=lora", *_many(sampling)]
    decouple = ["decouple", "--num_stages=2", "--training.steps=2", "--launch.executor=debug", *_TRAINING]
    yield [*decouple, "--output_dir=decouple"]
    yield [*decouple, "--output_dir=decouple-lora", "--method=lora", "--lora.rank=2", "--preset=released"]
    yield ["merge", "--output_dir=merged", "--stages=[decouple]", "--weights=[0.3,0.6]"]
    yield ["merge", "--output_dir=merged-ties", "--stages=[decouple]", "--weights=[1,1]", "--ties_keep=0.3"]
    yield ["merge", "--output_dir=merged-lora", "--stages=[decouple-lora]", "--weights=[0.5,1]"]
    search = ["--search.strategies=[grid,tpe]", "--search.evaluations=4", "--search.coarse=[0,1]", "--search.fine=[0]"]
    yield ["merge", "--output_dir=searched", "--stages=[decouple]", *search, *_many(sampling)]
    yield ["sample", "--output_dir=sample-experts", "--schedule=decouple/experts.yaml", *sampling]
    Path("compare.yaml").write_text(_COMPARE)
    yield ["compare", "--config=compare.yaml", *_TRAINING, *_many(sampling)]
    _write_pipeline(Path("pipeline"), Path("images"))
    latent = ["--model=pipeline", "--data.source=images", "--data.image_size=32"]
    yield ["cache", "--output_dir=cache", *latent]
    latent += ["--cache=cache", "--training.steps=2"]
    yield ["train", "--output_dir=latent", *latent, *_TRAINING, "--training.batch_size=2"]
    yield ["analyze", "--output_dir=analyze", "--timesteps=3", "--samples=8", "--learned=[dmp]"]
    yield ["analyze", "--output_dir=analyze-stages", "--gradients=false", "--losses=false", "--stages=[decouple]"]


def _many(sampling: list[str]) -> list[str]:
    return [sampling[0], "--sampling.num_images=64"]


_COMPARE = """
output_dir: compare
entries:
  - {name: base, method: none}
  - {name: DMP, method: dmp}
  - {name: weighted LoRA, method: lora, lora: {rank: 2}, weighting: {name: min_snr}}
  - {name: experts, method: none, schedule: decouple/experts.yaml}
training_seeds: [0, 1]
evaluate_every: 2
training: {steps: 4}
launch: {executor: debug}
"""


def _write_pipeline(model: Path, images: Path) -> None:
    from PIL import Image

    from tests.tiny_pipelines import PIPELINES

    PIPELINES["UNet2DConditionModel"].build().save_pretrained(model)
    images.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(4):
        pixels = torch.randint(0, 255, (48, 40, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(images / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of {number} cats"}))
    (images / "metadata.jsonl").write_text("\n".join(rows))


def _facts(path: Path) -> dict[str, Any] | None:
    if path.is_dir() or path.parts[0] in ("pipeline", "images") or path.suffix in (".png", ".html", ".lock"):
        return None
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        values = [tensor.double() for tensor in tensors.values()]
        sums = [sum(float(value.sum()) for value in values), sum(float(value.abs().sum()) for value in values)]
        return {"sha256": digest.hexdigest(), "sums": sums}
    if path.name in ("results.json", "metrics.json", "analysis.json", "search.json"):
        return _json_facts(json.loads(path.read_text()))
    if path.name == "log.jsonl":
        return _json_facts([json.loads(line) for line in path.read_text().splitlines()])
    return None


def _json_facts(value: Any) -> dict[str, Any]:
    kept = _without_varying(value)
    numbers = [number for number in _numbers(kept) if math.isfinite(number)]
    text = json.dumps(kept, sort_keys=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "sums": [sum(numbers), sum(map(abs, numbers))]}


def _without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_varying(held) for name, held in value.items() if name not in _VARYING}
    return [_without_varying(held) for held in value] if isinstance(value, list) else value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _numbers(held)
    elif isinstance(value, int | float):
        yield float(value)


def _kept(golden: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What golden.json is to hold: other processors' hashes as far as what they are of has not changed."""
    sums = {path: facts["sums"] for path, facts in found.items()}
    hashes = {path: facts["sha256"] for path, facts in found.items()}
    own = next((each["sha256"] for each in golden["hashes"] if each["environment"] == environment()), None)
    if own is None:
        same = {path for path in sums if path in golden["sums"] and are_close(sums[path], golden["sums"][path])}
    else:
        same = {path for path in hashes if hashes[path] == own.get(path)}
    others = [
        {**each, "sha256": {path: value for path, value in each["sha256"].items() if path in same}}
        for each in golden["hashes"]
        if each["environment"] != environment()
    ]
    return {"sums": sums, "hashes": [*others, {"environment": environment(), "sha256": hashes}]}


def are_close(ours: list[float], theirs: list[float]) -> bool:
    """Of sums, on two processors."""
    return all(math.isclose(one, other, rel_tol=1e-2, abs_tol=1e-2) for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = record(Path(scratch))
    GOLDEN.write_text(json.dumps(_kept(json.loads(GOLDEN.read_text()), found), indent=1) + "\n")
    print(f"{len(found)} files", file=sys.stderr)
