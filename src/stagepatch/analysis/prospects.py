"""What each method would cost here, by a few steps of it, beside what it has gained on the bench."""

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagepatch.core import UserError
from stagepatch.diffusion import Objective
from stagepatch.methods import LoRAConfig, MethodConfig, make_method
from stagepatch.patch import with_condition
from stagepatch.sampling import SamplingConfig, load_fakes, sampled_as_trained
from stagepatch.training import DDOConfig, TrainingConfig, read_log, train

_TIMED = 4  # steps, after as many to warm up
_OWN_MEMORY = Path("/proc/self")


@dataclass
class Prospect:
    """A method, its cost here, and its gain elsewhere.

    Args:
        parameters: that train.
        seconds: a step; NaN where it could not be run.
        memory_gib: most memory during its steps: of an accelerator what is allocated, else of the whole process; NaN
            where that cannot be had.
        sample_seconds: to make a sample of the model's own, where it needs them; else 0.
        gain: on the bench of docs/evidence.md, in words.
        refused: why it could not be run.
    """

    key: str
    label: str
    gain: str
    parameters: int = 0
    seconds: float = math.nan
    memory_gib: float = math.nan
    sample_seconds: float = 0.0
    refused: str = ""


# Of docs/evidence.md, FID at 25 steps: 'The proof', 'How it was chosen' and 'The recommended recipe'.
_GAINS = {
    "finetune": "+0.8 ± 0.6 % (its base is converged)",
    "lora": "+0.6 ± 1.3 %",
    "stage_lora": "−0.6 % (one seed)",
    "dmp": "−0.1 ± 0.1 %",
    "ddo": "−12.0 ± 0.8 %; −16.1 ± 0.7 % in 50 steps (by DDPM: −2 %, one seed)",
}
_LABELS = {
    "finetune": "fine-tuning, all weights",
    "lora": "LoRA, r = 8",
    "stage_lora": "stage LoRA, r = 2, K = 4",
    "dmp": "DMP",
    "ddo": "DDO, LoRA, r = 8",
}
_METHODS = {
    "finetune": MethodConfig("finetune"),
    "lora": MethodConfig("lora"),
    "stage_lora": MethodConfig("lora", lora=LoRAConfig(rank=2, num_stages=4)),
    "dmp": MethodConfig("dmp"),
    "ddo": MethodConfig("lora"),
}


def measure_prospects(
    model: nn.Module,
    objective: Objective,
    dataset: Any,
    batch_size: int,
    horizontal_flip: bool = False,
    on_method: Callable[[str], object] = lambda name: None,
) -> list[Prospect]:
    """A few steps of each method on copies of a model: parameters, seconds a step, memory.

    One that cannot be had for this model, or does not fit into memory, says so.
    """
    found = []
    for key, config in _METHODS.items():
        on_method(_LABELS[key])
        prospect = Prospect(key, _LABELS[key], _GAINS[key])
        try:
            _measure(prospect, config, model, objective, dataset, batch_size, horizontal_flip)
        except UserError as error:
            prospect.refused = str(error)
        except torch.OutOfMemoryError:
            prospect.refused = f"does not fit into memory in steps of {batch_size}"
        found.append(prospect)
    return found


def _measure(
    prospect: Prospect,
    config: MethodConfig,
    model: nn.Module,
    objective: Objective,
    dataset: Any,
    batch_size: int,
    horizontal_flip: bool,
) -> None:
    other = copy.deepcopy(model)
    config = MethodConfig(config.method, with_condition(config.patch, other), config.lora)
    trial = make_method(config)
    prospect.parameters = sum(value.numel() for group in trial.prepare(other) for value in group["params"])
    training = TrainingConfig(
        steps=2 * _TIMED, log_every=_TIMED, batch_size=batch_size, ema_decay=0.998, tensorboard=False
    )
    with tempfile.TemporaryDirectory() as name:
        directory, ddo = Path(name), None
        if prospect.key == "ddo":
            sampling = SamplingConfig(num_inference_steps=25, num_images=batch_size, batch_size=batch_size)
            since = time.perf_counter()
            sampling = sampled_as_trained(sampling, objective.scheduler)
            fakes = load_fakes(directory / "fakes", model, objective.scheduler, dataset, sampling)
            prospect.sample_seconds, ddo = (time.perf_counter() - since) / batch_size, (DDOConfig(), fakes)
        memory = PeakMemory(next(model.parameters()).device)
        other = copy.deepcopy(model)
        options: dict[str, Any] = {"horizontal_flip": horizontal_flip, "progress": False, "ddo": ddo}
        train(other, make_method(config), objective, dataset, training, directory, **options)
        prospect.memory_gib = memory.gib()
        prospect.seconds = batch_size / read_log(directory)[-1]["images_per_second"]


class PeakMemory:
    """The most memory that is taken from here on [GiB]; NaN where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif (_OWN_MEMORY / "clear_refs").exists():
            (_OWN_MEMORY / "clear_refs").write_text("5")  # Linux: let the peak begin anew

    def gib(self) -> float:
        """Allocated on an accelerator; without one, resident, of the whole process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device)) / 2**30
        if not (_OWN_MEMORY / "status").exists():
            return math.nan
        lines = dict(line.partition(":")[::2] for line in (_OWN_MEMORY / "status").read_text().splitlines())
        return float(lines["VmHWM"].split()[0]) / 2**20
