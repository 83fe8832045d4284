"""Count parameters."""

import math
from dataclasses import replace

import torch

from stagepatch.cli import config as configs
from stagepatch.families import NAMED_MODELS, build_named
from stagepatch.patch import Patch
from stagepatch.report import print_table


def params(config: configs.ParamsConfig, resolved: str) -> None:
    """Count base and added parameters on the meta device."""
    rows = []
    for name in config.models or ["DiT-B/2", "DiT-L/2", "DiT-XL/2", *NAMED_MODELS]:
        model = build_named(name)
        base = sum(value.numel() for value in model.parameters())
        small = config.patch.grid or (NAMED_MODELS[name]["grid"] if name in NAMED_MODELS else [16, 16])
        row = [name, f"{base:,}"]
        for grid in (None, small):
            with torch.device("meta"):
                patch = Patch.create(model, replace(config.patch, grid=grid))
            added = patch.num_parameters()
            # Cut to two decimals, not rounded: so Table 1 of arXiv 2405.17825 has 1.2674% as 1.26%.
            share = f"+{math.floor(added / base * 1e4) / 1e2:.2f}%"
            row += ["×".join(map(str, patch.gate_grid)), f"{added:,}", share]
        rows.append(row)
    columns = ["model", "base", "tokens", "added", "share (cut)", "grid", "added", "share (cut)"]
    print_table(columns, rows, "Parameters of a patch: one prompt per token, and a grid of few")
