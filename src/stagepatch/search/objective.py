"""What a candidate is worth: a metric of its samples, from the same noise for all candidates."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, processes, progress_bar
from stagepatch.evaluation import METRICS, Evaluator
from stagepatch.families import sample_shape
from stagepatch.sampling import LatentSampling, SamplingConfig
from stagepatch.search.engine import Evaluation, Report, Search, Strategy, best_of

_PARTS = 4  # an intermediate value is of the first of so many parts of the images


class SampledMetric:
    """A metric of a model's samples, with the sign that makes it low.

    Labels, noise and references never change, so the same model gives the same.

    Args:
        evaluator: samples, and has the features of the references.
        name: of the metric; its reference is features.

    Attributes:
        on_batch: called with the number of images done after each batch.

    Raises:
        UserError: no held-out images.
    """

    def __init__(self, evaluator: Evaluator, name: str) -> None:
        self.metric, self._name, self._evaluator = METRICS[name], name, evaluator
        if any(evaluator.reference(split, self.metric.of) is None for split in self.metric.references):
            raise UserError(f"metric='{name}': these data have no held-out images; use 'fid_train'.")
        self.on_batch: Callable[[int], None] | None = None

    def __call__(
        self, model: nn.Module, scheduler: Any, sampling: SamplingConfig, report: Report | None = None
    ) -> float:
        """Its value; infinite where the samples are no numbers.

        Args:
            report: is called with the value of the first quarter of the images.
        """
        evaluator = copy.copy(self._evaluator)
        if report is not None:
            count = math.ceil(sampling.num_images / _PARTS)
            sampling = replace(sampling, batch_size=min(count, sampling.batch_size))
            latents = evaluator.latents or LatentSampling(sample_shape(model), lambda samples: samples, None)
            evaluator.latents = replace(latents, decode=self._reporting(latents.decode, count, report))
        return self._value(evaluator.sample(model, scheduler, sampling, self.on_batch))

    def _value(self, images: Tensor) -> float:
        samples = self._evaluator.collect(images, [self._name])
        if not all(bool(values.isfinite().all()) for values in samples.values()):
            return math.inf
        return self.metric.sign * self._evaluator.measure_collected(samples, [self._name])[self._name]

    def _reporting(self, decode: Callable[[Tensor], Tensor], count: int, report: Report) -> Callable[[Tensor], Tensor]:
        """Decoding that reports the value of the first images, as soon as there are so many."""
        first: list[Tensor] = []

        def decode_and_report(samples: Tensor) -> Tensor:
            images, done = decode(samples), sum(map(len, first))
            if done < count:
                first.append(images.float().cpu())
                if done + len(images) >= count:
                    report(self._value(torch.cat(first)))
            return images

        return decode_and_report


def check_alone(command: str) -> None:
    """Refuse to search in a launch.

    Raises:
        UserError: this process is one of several.
    """
    if processes().num_processes > 1:
        raise UserError(
            f"A search is not shared under `accelerate launch`: start `stagepatch {command}` several times instead, "
            f"each on its own device; they share the evaluations through the storage."
        )


def run_search(search: Search, strategies: Sequence[Strategy], metric: SampledMetric) -> dict[str, list[Evaluation]]:
    """`Search.run` with progress bars.

    Args:
        metric: that the objective takes.

    Raises:
        UserError: see `Search.run`.
    """
    with progress_bar() as progress:
        images = progress.add_task("sampling", total=None, status="")
        metric.on_batch = lambda count: progress.advance(images, count)
        tasks = {each.name: progress.add_task(each.name, total=None, status="") for each in strategies}

        def on_progress(name: str, ended: list[Evaluation], total: int) -> None:
            best = f"best {metric.metric.sign * best_of(ended).value:.4g}" if ended else ""
            progress.update(tasks[name], completed=len(ended), total=total, status=best)

        return replace(search, on_progress=on_progress).run(strategies)
