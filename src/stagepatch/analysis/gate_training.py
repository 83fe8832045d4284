"""How a patch's gate sharpens while it trains, by the snapshots of its run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stagepatch.analysis.activation import Condition, gate_activation, plot_curves
from stagepatch.analysis.result import Analysis
from stagepatch.methods import open_artifact
from stagepatch.patch import Patch, gate_entropy
from stagepatch.report import Table


def analyze_gate_training(
    model: nn.Module,
    snapshots: Mapping[int, Path],
    timesteps: Tensor,
    conditions: Sequence[Condition] = (0,),
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
    shape: tuple[int, int, int] | None = None,
) -> Analysis:
    """Entropy and effective number of prompts of a gate at each snapshot, mean over timesteps and conditions.

    Args:
        snapshots: directories of patches by iteration; see `find_snapshots`.
        timesteps, conditions, batch_size, on_batch, shape: see `analyze_gate`.

    Raises:
        UserError: a snapshot that is no patch, or one whose gate has no weights.
    """
    entropies, effectives, largest, names = [], [], [], list[str]()
    for path in snapshots.values():
        open_artifact(path, "patch")
        patch = Patch.from_pretrained(path)
        names = [site.name for site in patch.backbone.sites]
        with patch.attach(model):
            found = [
                gate_activation(model, patch, timesteps, condition, batch_size, on_batch, shape)
                for condition in conditions
            ]
        entropy = torch.stack([gate_entropy(weights) for weights in found]).mean(dim=0)
        entropies.append(entropy.mean(dim=1))
        effectives.append(entropy.exp().mean(dim=1))
        largest.append(max(float(weights.max()) for weights in found))
    entropy, effective = torch.stack(entropies, dim=1), torch.stack(effectives, dim=1)
    rows = [
        [f"{iteration:,}", f"{entropy[:, place].mean():.4g}", f"{effective[:, place].mean():.4g}", f"{most:.4g}"]
        for place, (iteration, most) in enumerate(zip(snapshots, largest, strict=True))
    ]
    note = (
        f"Of each snapshot's gate, mean over {len(timesteps)} timesteps and all blocks, but for the largest. Entropy "
        f"[nats] of the weights as shares of their sum; effective prompts: its exponential at each timestep and block."
    )
    columns = ["iteration", "entropy", "effective prompts", "largest activation"]
    panels = {"entropy [nats]": entropy, "effective prompts": effective}
    return Analysis(
        "gate_training",
        "The gate over training",
        {"iterations": [*snapshots], "sites": names, "entropy": entropy, "effective_prompts": effective},
        plot_curves(panels, [*snapshots], names, "iteration"),
        "At each snapshot, a line a block: entropy of the gate's weights, and how many prompts share them, its "
        "exponential.",
        [Table("Gate over training", columns, rows, note)],
        [],
    )
