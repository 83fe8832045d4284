"""What a file or directory of stagepatch holds, as rows of a table."""

from __future__ import annotations

import json
from pathlib import Path

from stagepatch.checkpoints import load_denoiser
from stagepatch.checkpoints.loading import BUNDLED
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, read_tensors
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.methods.weights import WEIGHTS_NAME
from stagepatch.patch import Patch
from stagepatch.training.checkpoint import CHECKPOINT_NAME
from stagepatch.training.log import read_log


def describe_path(path: Path) -> list[list[str]]:
    """Rows of what and value.

    Raises:
        UserError: nothing there, or nothing that is known here.
    """
    path = BUNDLED.get(str(path), path)
    if not path.exists():
        raise UserError(f"Nothing at '{path}'.")
    rows: list[list[str]] = []
    if path.is_file():
        return _tensor_file(path)
    if (path / "config.json").exists() and "patch" in read_json(path / "config.json"):
        rows += _patch(path)
    if (path / LORA_CONFIG).exists():
        rows += [[f"LoRA {name}", str(value)] for name, value in read_json(path / LORA_CONFIG).items()]
        rows += _tensor_file(path / LORA_FILE)
    if (path / WEIGHTS_NAME).exists():
        rows += [["trained weights", row] for _, row in _tensor_file(path / WEIGHTS_NAME)]
    if (path / "results.json").exists():
        rows += [["comparison", f"table in '{path / 'table.md'}'"]]
    if (path / "index.safetensors").exists():
        index, _ = read_tensors(path / "index.safetensors")
        rows += [["cache", f"{len(index['file']):,} images, {int(index['caption'].max()) + 1:,} captions"]]
    if (path / "transformer").is_dir() or (path / "unet").is_dir():
        rows += _model(path)
    if (path / CHECKPOINT_NAME).exists():
        rows += _tensor_file(path / CHECKPOINT_NAME)
    if records := read_log(path):
        rows += [["last record", json.dumps(records[-1])]]
    if not rows:
        raise UserError(f"'{path}' holds no patch, model, run, cache or checkpoint.")
    return rows


def _patch(path: Path) -> list[list[str]]:
    patch = Patch.from_pretrained(path)
    sites = patch.backbone.sites
    rows = [
        ["patch for", f"{patch.backbone.model_class}, {len(sites)} sites: {sites[0].name} … {sites[-1].name}"],
        ["tokens and channels", f"{sites[0].grid[0]}×{sites[0].grid[1]}, {sites[0].channels}"],
        ["parameters", f"{patch.num_parameters():,}"],
        ["size of file", f"{(path / 'model.safetensors').stat().st_size:,} bytes"],
    ]
    config = patch.config
    for name in ("preset", "position", "gate", "condition", "selection", "num_experts"):
        rows.append([name, str(getattr(config, name))])
    norms = " ".join(f"{float(prompt.detach().norm()):.3g}" for prompt in patch.prompts)
    return [*rows, ["norm of prompts by site", norms]]


def _model(path: Path) -> list[list[str]]:
    model, scheduler = load_denoiser(path)
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        ["model", type(model).__name__],
        ["parameters", f"{count:,}"],
        ["scheduler", f"{type(scheduler).__name__}, {scheduler.config.get('prediction_type', 'flow')}"],
    ]


def _tensor_file(path: Path) -> list[list[str]]:
    tensors, metadata = read_tensors(path)
    kind = f"checkpoint at iteration {metadata['iteration']}" if "iteration" in metadata else "safetensors"
    count = sum(tensor.numel() for tensor in tensors.values())
    return [[kind, f"{len(tensors)} tensors, {count:,} numbers"]]
