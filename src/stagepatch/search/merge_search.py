"""A search for the weights of a merge."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stagepatch.checkpoints import add_projections, load_denoiser
from stagepatch.checkpoints.fingerprint import model_fingerprint, weights_fingerprint
from stagepatch.checkpoints.layout import find_model
from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core.processes import processes
from stagepatch.core.tensors import TensorReader
from stagepatch.evaluation import Evaluator
from stagepatch.merging.lora import combine_loras, read_loras
from stagepatch.merging.merge import combine, open_all, piece_size
from stagepatch.merging.stages import Stages
from stagepatch.methods import LoRA
from stagepatch.methods.lora import ADAPTER
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.search.config import MergeConfig
from stagepatch.search.engine import Box, Evaluation, Point, Report
from stagepatch.search.objective import SampledMetric, run_search
from stagepatch.search.strategies import weight_strategies


class MergedModel:
    """A model that is overwritten for each weights by what `merge_models` would write.

    Base and stages are held on the CPU as their files hold them.

    Attributes:
        scheduler: the one the base was trained with.

    Raises:
        UserError: a stage of another architecture, by name of what differs.
    """

    def __init__(self, stages: Stages, ties_keep: float = 0.0) -> None:
        readers = open_all(find_model(stages.base), stages.directories)
        names = list(readers[0].shapes)
        model, self.scheduler = load_denoiser(stages.base)
        numbers = [int(name.split(".")[-1]) for name in names if name.startswith(f"{PROJECTION}.")]
        if numbers and not hasattr(model, PROJECTION):
            add_projections(model, numbers)
        self._model: nn.Module = model.to(processes().device)
        self._parts = {name: [reader.read(name) for reader in readers] for name in names}
        self._ties_keep = ties_keep

    @torch.no_grad()
    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        own = self._model.state_dict()
        for name, parts in self._parts.items():
            size = piece_size(parts[0].shape, self._ties_keep)
            pieces = [tensor.view(-1).split(size) for tensor in (own[name], *parts)]
            for target, base, *stages in zip(*pieces, strict=True):
                target.copy_(combine(base, stages, weights, self._ties_keep))
        return self._model


class MergedLoRA:
    """The base with one LoRA, which for each weights is what `merge_loras` would write."""

    def __init__(self, stages: Stages) -> None:
        self._config, self._loras = read_loras(stages.directories)
        model, self.scheduler = load_denoiser(stages.base)
        LoRA(self._config).prepare(model)
        self._model: nn.Module = model.to(processes().device)

    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        from peft.utils import set_peft_model_state_dict

        merged = combine_loras(self._loras, weights)
        state = {name.split(".", 1)[1]: tensor for name, tensor in merged.items()}  # its first part names the denoiser
        set_peft_model_state_dict(self._model, state, adapter_name=ADAPTER)
        return self._model


def search_weights(config: MergeConfig, stages: Stages) -> dict[str, list[Evaluation]]:
    """The evaluations of each strategy.

    Raises:
        UserError: settings that cannot be, a stage of another architecture, data or an extractor that cannot be had,
            or a storage of another search.
    """
    options, output = config.search, Path(config.output_dir)
    count = len(stages.directories)
    strategies = weight_strategies(options, count)
    merged = MergedLoRA(stages) if stages.are_loras else MergedModel(stages, config.ties_keep)
    evaluator = Evaluator.load(stages.base, config.data, config.extractor, Path(config.cache or output / "cache"))
    metric = SampledMetric(evaluator, options.metric)

    def objective(weights: Point, report: Report | None) -> float:
        return metric(merged.at(weights), merged.scheduler, config.sampling, report)

    identity = {
        "base": model_fingerprint(find_model(stages.base)),
        "stages": [_fingerprint(directory, stages.are_loras) for directory in stages.directories],
        **{name: getattr(config, name) for name in ("ties_keep", "extractor", "sampling", "data")},
        "metric": options.metric,
    }
    return run_search(options, output, Box(count, options.low, options.high), objective, metric, identity, strategies)


def _fingerprint(directory: Path, is_lora: bool) -> str:
    return weights_fingerprint(TensorReader([directory / LORA_FILE])) if is_lora else model_fingerprint(directory)
