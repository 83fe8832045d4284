"""A row of a comparison with one training seed: trained, and measured."""

import contextlib
import resource
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from stagepatch.checkpoints import build_denoiser, load_denoiser, load_scheduler
from stagepatch.core import UserError, as_json, locked, processes, read_json, write_json, write_tensors
from stagepatch.diffusion import check_tells_timesteps
from stagepatch.evaluation import Evaluator
from stagepatch.methods import load_learned, make_method, open_learned
from stagepatch.sampling import SamplingConfig, attach_guide, load_experts, read_schedule
from stagepatch.studies.compare_config import ITSELF
from stagepatch.studies.decouple_config import DecoupleConfig, StageTrainingConfig
from stagepatch.studies.decouple_jobs import EXPERTS_NAME, Stage, plan_stages, write_experts
from stagepatch.studies.job import Job
from stagepatch.training import Run, TrainConfig, read_log

_WEIGHTS = (".", "weights", "patch", "transformer", "unet")  # 'weights' and 'patch' of method 'joint'
METRICS_NAME, COST_NAME, SAMPLES_NAME = "metrics.json", "cost.json", "samples.safetensors"
RUN_FIELDS = ("model", "method", "dtype", "patch", "lora", "start_from", "weighting", "timesteps", "data", "training")
# What a run need not share, nor knows the defaults of.
_NOT_TRAINING = ("held_out", "second_extractor", "num_stages", "after")


@dataclass
class CompareJob(Job):
    """One entry, trained with one seed, and measured at its checkpoints.

    Args:
        directory: its own; the training run is in its 'learned'.
        name: the entry's.
        checkpoints: steps after which it is measured.
        schedule: file of experts by timestep, sampled in place of the model alone.
        learned: directory of what is put on the model, or on each expert, untrained.
        is_base: the comparison's own model, untrained, which the others are compared with.
        held_out: which of the held-out images it is measured against.
        second_extractor: of a second FID.
        control: see `EntryConfig`.
        num_stages: ranges of timesteps, each with what it learned alone; 0 for one training of all.
        trained_by: the job that trains the same, in its directory, where another does.
        after: the job whose result it trains on from.
    """

    directory: Path
    config: TrainConfig
    name: str
    sampling: SamplingConfig
    sampling_seeds: list[int]
    extractor: str
    checkpoints: list[int]
    schedule: str = ""
    learned: str = ""
    is_base: bool = False
    held_out: Literal["held_out", "tune"] = "held_out"
    second_extractor: str = ""
    control: str = ""
    num_stages: int = 0
    trained_by: "CompareJob | None" = None
    after: "CompareJob | None" = None
    record = "job.json"
    noun = "job"

    def __str__(self) -> str:
        return f"'{self.name}' (seed {self.config.training.seed})"

    def identity(self) -> dict[str, Any]:
        elsewhere = ("directory", "config", "is_base", "control", "trained_by", "after")
        own = {name: value for name, value in vars(self).items() if name not in elsewhere}
        own["after"] = self.after.name if self.after else ""
        own |= {name: getattr(self.config, name) for name in RUN_FIELDS}
        return own | self.config.learns_by()

    def is_done(self) -> bool:
        return set(self.metrics()) >= set(self.checkpoints)

    def metrics(self) -> dict[int, list[dict[str, float]]]:
        """Of every sampling seed by checkpoint, as far as they are measured."""
        path = self.directory / METRICS_NAME
        return {int(step): metrics for step, metrics in read_json(path).items()} if path.exists() else {}

    def work(self) -> None:
        is_main = processes().is_main_process
        if is_main:
            write_json(self.directory / self.record, as_json(self.identity()))
        learned, schedule, method = Path(self.config.output_dir), self.schedule, None
        if self.trained_by is not None:
            self.trained_by.train_or_wait()
            if is_main:  # kept here too, for when the other row is left out
                write_json(self.directory / COST_NAME, read_json(self.trained_by.directory / COST_NAME))
        elif self.config.method != "none":
            self.train()
        if self.num_stages:
            schedule = str(learned / EXPERTS_NAME)
        done, sampling = self.metrics(), self.sampling
        dtype = getattr(torch, self.config.dtype)
        model, scheduler = load_denoiser(self.config.model, dtype)
        model.to(processes().device)
        if sampling.guide != ITSELF:
            attach_guide(model, scheduler, sampling)
        if schedule:
            experts = load_experts(schedule, model, scheduler, self.learned)
            experts.attach(model)
            sampling = experts.sampling(sampling)
        elif self.learned:
            load_learned(model, Path(self.learned))
        cache, second = Path(self.config.cache), self.second_extractor
        evaluator = Evaluator.load(
            self.config.model, self.config.data, self.extractor, cache, self.held_out, second, dtype
        )
        for step in sorted(set(self.checkpoints) - set(done)):
            saved = learned if step == self.config.training.steps else learned / "snapshots" / f"{step:07d}"
            guide = None
            if self.sampling.guide == ITSELF:
                sampling = replace(self.sampling, guide=str(saved))
                guide = attach_guide(model, scheduler, sampling)
            elif method is not None:
                method.load(model, saved)
            elif self.config.method != "none" and not self.num_stages:
                method = load_learned(model, saved)
            measured = evaluator.measure(model, scheduler, sampling, self.sampling_seeds)
            if guide is not None:  # of this checkpoint
                guide.detach()
            done[step] = measured.metrics
            if is_main:
                write_tensors(self.directory / SAMPLES_NAME, {"images": measured.images[:100]})
                write_json(self.directory / METRICS_NAME, {str(key): value for key, value in sorted(done.items())})

    def train_or_wait(self) -> None:
        """From another job: `train`, unless another process is at it, which is waited for."""
        with locked(self.directory / "lock") if processes().is_main_process else contextlib.nullcontext():
            processes().wait_for_everyone()
            self.train()

    def train(self) -> None:
        """Train, or what is left of it, and say what it took."""
        if (self.directory / COST_NAME).exists() and Path(self.config.output_dir).exists():
            return
        runs = [Path(stage.config.output_dir) for stage in self.stages()] or [Path(self.config.output_dir)]
        for stage in self.stages():
            stage.run()
        if not self.num_stages:
            self._train_one()
        if processes().is_main_process:
            if self.num_stages:
                write_experts(self.stages(), Path(self.config.output_dir) / EXPERTS_NAME)
            write_json(self.directory / COST_NAME, _cost(self.config.training.batch_size, runs))

    def stages(self) -> list[Stage]:
        """Of each range of timesteps, where it has ranges.

        Raises:
            UserError: ranges, or a method, that the model cannot take.
        """
        if not self.num_stages:
            return []
        values = {field.name: getattr(self.config, field.name) for field in fields(TrainConfig)}
        values["training"] = StageTrainingConfig(**vars(replace(self.config.training, snapshot_every=0)))
        return plan_stages(DecoupleConfig(**values, preset="experts", num_stages=self.num_stages))

    def _train_one(self) -> None:
        config = self.config
        if self.after is not None:
            before = self.after.trained_by or self.after
            before.train_or_wait()
            config = replace(config, start_from=before.config.output_dir)
        run = Run(config, identity={k: v for k, v in self.identity().items() if k not in _NOT_TRAINING})
        if self.config.objective != "denoising" and self.config.ddo.fakes:  # one job makes them, the others wait
            path = Path(self.config.ddo.fakes) / "lock"
            with locked(path) if processes().is_main_process else contextlib.nullcontext():
                processes().wait_for_everyone()
                run.load_fakes()
        run.train(progress=False)

    def costs(self) -> dict[str, float]:
        """Seconds a step, peak memory [bytes] and size of what was learned [bytes]."""
        values: dict[str, float] = read_json(self.directory / COST_NAME)
        return values

    def trainable_parameters(self) -> tuple[int, int]:
        """Numbers that it trains, and numbers of the model; counted without allocating any.

        Raises:
            UserError: the method cannot be had on that model, nothing of it is where it starts from, or the experts'
                file has a mistake.
        """
        model = build_denoiser(self.config.model)
        total = sum(parameter.numel() for parameter in model.parameters())
        method = make_method(self.config)
        method.check_start(self.after.config.output_dir if self.after else self.config.start_from)
        if self.config.start_from and open_learned(Path(self.config.start_from)).kind != method.kind:
            raise UserError(f"start_from='{self.config.start_from}' is of another method than '{self.config.method}'.")
        if method.goes_by_timestep:
            check_tells_timesteps(load_scheduler(self.config.model), "A LoRA whose maps or ranks are weighed")
        groups = method.prepare(model)
        if self.learned:
            open_learned(Path(self.learned))
        if self.schedule:
            timesteps = load_scheduler(self.config.model).config.num_train_timesteps
            read_schedule(Path(self.schedule), timesteps, self.learned)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        return trained * max(1, len(self.stages())), total


def _cost(batch_size: int, runs: list[Path]) -> dict[str, Any]:
    """See `CompareJob.costs`."""
    speeds = [record["images_per_second"] for learned in runs for record in read_log(learned)]
    folders = [learned / name for learned in runs for name in _WEIGHTS]
    files = [path for folder in folders for path in folder.glob("*.safetensors")]
    kept = [path for path in files if "checkpoint" not in path.name]
    # Of the accelerator, or of the process, its imports included.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds_per_step": batch_size / statistics.median(speeds),
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory,
        "file_size": sum(path.stat().st_size for path in kept),
    }
