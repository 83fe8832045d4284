"""Say what a path holds."""

import json
from collections.abc import Callable
from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.core import read_json, read_tensors
from stagepatch.methods import Artifact, open_artifact
from stagepatch.patch import Patch, describe_patch
from stagepatch.report import print_table
from stagepatch.training import read_log

Rows = list[list[str]]


def inspect(config: configs.InspectConfig, resolved: str) -> None:
    """Say what a path holds."""
    print_table(["what", "value"], describe_path(Path(config.path)), str(config.path))


def describe_path(path: Path) -> Rows:
    """Rows of what and value.

    Raises:
        UserError: nothing there, or nothing that is known here.
    """
    artifact = open_artifact(path)
    path = artifact.path
    describe = _DESCRIBED.get(artifact.kind)
    rows = describe(artifact) if describe else [["holds", artifact.description]]
    if path.is_dir():
        if (path / "checkpoint.safetensors").exists():
            rows += _tensors(path / "checkpoint.safetensors")
        if records := read_log(path):
            rows += [["last record", json.dumps(records[-1])]]
    return rows


def _patch(artifact: Artifact) -> Rows:
    patch = Patch.from_pretrained(artifact.path)
    rows = [[f"patch: {name}", value] for name, value in describe_patch(patch).items()]
    size = f"{(artifact.path / 'model.safetensors').stat().st_size:,} bytes"
    norms = " ".join(f"{float(prompt.detach().norm()):.3g}" for prompt in patch.prompts)
    return [*rows, ["size of file", size], ["norm of prompts by site", norms]]


def _lora(artifact: Artifact) -> Rows:
    config = read_json(artifact.path / "lora.json")
    rows = [[f"LoRA {name}", str(value)] for name, value in config.items()]
    return rows + _tensors(artifact.path / "pytorch_lora_weights.safetensors")


def _wavelet(artifact: Artifact) -> Rows:
    config = read_json(artifact.path / "wavelet.json")["wavelet"]
    rows = [[f"wavelet {name}", str(value)] for name, value in config.items()]
    return rows + _tensors(artifact.path / "wavelet.safetensors")


def _model(artifact: Artifact) -> Rows:
    model, scheduler = artifact.load()
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        ["model", type(model).__name__],
        ["parameters", f"{count:,}"],
        ["scheduler", f"{type(scheduler).__name__}, {scheduler.config.get('prediction_type', 'flow')}"],
    ]


def _cache(artifact: Artifact) -> Rows:
    index, _ = read_tensors(artifact.path / "index.safetensors")
    captions = index.get("captions", index["caption"])
    return [["cache", f"{len(index['file']):,} images, {int(captions.max()) + 1:,} captions"]]


def _tensors(path: Path) -> Rows:
    tensors, metadata = read_tensors(path)
    kind = f"checkpoint at iteration {metadata['iteration']}" if "iteration" in metadata else "safetensors"
    count = sum(tensor.numel() for tensor in tensors.values())
    return [[kind, f"{len(tensors)} tensors, {count:,} numbers"]]


_DESCRIBED: dict[str, Callable[[Artifact], Rows]] = {
    "patch": _patch,
    "LoRA": _lora,
    "wavelet gates": _wavelet,
    "weights": lambda artifact: [["trained weights", _tensors(artifact.path / "weights.safetensors")[0][1]]],
    "weights and patch": lambda artifact: [
        *describe_path(artifact.path / "weights"),
        *describe_path(artifact.path / "patch"),
    ],
    "model": _model,
    "cache": _cache,
    "comparison": lambda artifact: [["comparison", f"table in '{artifact.path / 'table.md'}'"]],
    "tensors": lambda artifact: _tensors(artifact.path),
}
