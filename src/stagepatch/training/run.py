"""One training job, put together from one config."""

import contextlib
import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from stagepatch.checkpoints import (
    MemoryConfig,
    build_denoiser,
    check_available,
    denoiser_ranges,
    has_vae,
    is_pipeline,
    load_denoiser,
    on_device,
    pinned,
    sign_of_distillation,
    with_commits,
)
from stagepatch.core import UserError, alone_in, processes, write_text
from stagepatch.data import check_channels, fit_to_model, load_held_out, load_training_data
from stagepatch.diffusion import Objective, TimestepsConfig, check_tells_timesteps, make_timesteps, make_weighting
from stagepatch.families import learns_sigma, with_density
from stagepatch.methods import Finetune, Method, load_learned, make_method, open_learned
from stagepatch.patch import with_condition
from stagepatch.sampling import Fakes, load_fakes, sampled_as_trained
from stagepatch.training.assistant import Assistant
from stagepatch.training.balancing import make_intervals
from stagepatch.training.check import Check
from stagepatch.training.held_out import HeldOutLosses
from stagepatch.training.live_report import LiveReport
from stagepatch.training.loop import train
from stagepatch.training.run_config import TrainConfig
from stagepatch.training.sharding import check_launch
from stagepatch.training.trackers import check_trackers
from stagepatch.training.validation import Validation

_LOGGER = logging.getLogger("stagepatch")
RUN_CONFIG = "run.yaml"

_IDENTITY = (
    *("model", "component", "method", "dtype", "patch", "lora", "assistant_lora", "start_from"),
    *("weighting", "timesteps", "data"),
)


def write_run_config(directory: str | Path, text: str) -> None:
    """Write a run's config, and which commits its Hub ids were."""
    write_text(Path(directory) / RUN_CONFIG, with_commits(text))


class Run:
    """Model, method, objective and data of a training job; `train` does it, or what is left of it.

        run = Run(TrainConfig(model="digits", output_dir="runs/patch"))
        patch = run.train().patch

    Its parts may be changed before `train`: the objective's timesteps, the method, the model.

    Args:
        config: of the job. A cache of latents is made first, if the model has a VAE and the cache is not there.
        model: trained in place of the one that the config names.
        scheduler: the one that goes with `model`.
        identity: the settings that a run which goes on must share, besides those of training; by default the config's.
        config_text: kept as run.yaml; by default the config.
        parts: of a model that is given and works on latents, the directory with its config, VAE and text encoder.

    Raises:
        UserError: a choice that cannot be, a model or data that cannot be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any = None,
        scheduler: Any = None,
        identity: Mapping[str, Any] | None = None,
        config_text: str = "",
        parts: str = "",
    ) -> None:
        check_launch()
        check_trackers(config.training)  # before anything is loaded or made
        data = fit_to_model(config.data, parts or config.model, None if parts else model)
        config = replace(config, data=data)
        shape = build_denoiser(config.model, config.component) if model is None else model
        timesteps = with_density(config.timesteps, shape)
        config = replace(config, patch=with_condition(config.patch, shape), timesteps=timesteps)
        self.config = config
        self.directory = Path(config.output_dir)
        own = {name: getattr(config, name) for name in _IDENTITY} | config.learns_by()
        own["memory"] = replace(config.memory, group_offload=False)  # which changes nothing that is learned
        self.identity = dict(identity or own)
        self.config_text = config_text or yaml.safe_dump(asdict(config), sort_keys=False)
        facts = {"base model": pinned(config.model), "data": config.data.source, "steps": str(config.training.steps)}
        facts |= {name: str(getattr(config.training, name)) for name in ("batch_size", "learning_rate", "seed")}
        self.timesteps = _own_part(config.timesteps, config) if config.component else config.timesteps
        if (ends := self.timesteps.range) != [0.0, 1.0]:
            facts["noise levels"] = f"{ends[0]:g} to {ends[1]:g}"
        self.method: Method = make_method(config, facts)
        if config.method == "none":
            raise UserError("method='none' trains nothing: give one that does.")
        if config.dtype != "float32" and isinstance(self.method, Finetune):
            raise UserError(
                f"method='{config.method}' trains the model's own weights, which dtype='{config.dtype}' spoils."
            )
        _check_memory(config, is_frozen=not isinstance(self.method, Finetune), is_given=model is not None)
        self.start_from = Path(config.start_from) if config.start_from else None
        if self.start_from is not None and (kind := open_learned(self.start_from).kind) != self.method.kind:
            raise UserError(
                f"start_from='{self.start_from}' is {kind}, which method='{config.method}' does not learn."
            )
        self.method.check_start(config.start_from)
        if config.objective == "ddo" and not self.method.starts_at_base:
            raise UserError(
                "objective='ddo' compares with the model as it is, from which this patch departs before it has "
                "learned: leave out patch.initialization and patch.prepending."
            )
        self._source = named = parts or (config.model if model is None else "")  # first the cache, then the model
        cache = (config.cache, config.output_dir, config.cache_batch_size)
        dtype = getattr(torch, config.dtype)
        self.dataset: Any = load_training_data(named, config.data, *cache, dtype)
        if config.objective == "ddo" and "mask" in self.dataset[0]:
            raise UserError("objective='ddo' compares with samples of the model, which have no masks: train without.")
        if config.objective != "denoising" and "references" in self.dataset[0]:
            raise UserError(
                f"objective='{config.objective}' learns from samples of the model, which are made of captions, not of "
                f"pictures to edit: train edits by objective='denoising'."
            )
        if config.data.num_frames > 1 and config.patch.sample_size is None:
            patch = replace(config.patch, sample_size=_trained_size(self.dataset))
            self.config = config = replace(config, patch=patch)
            self.method = make_method(config, facts)
        if model is None:
            model, scheduler = load_denoiser(named, dtype, config.component, config.memory)
        if not named or not has_vae(named):
            check_channels(self.dataset, int(model.config["in_channels"]), config.data)
        self.model, self.scheduler = model, scheduler
        self.assistant = self._load_assistant(named)
        if self.method.goes_by_timestep:
            check_tells_timesteps(scheduler, "A LoRA whose maps or ranks are weighed")
        self.objective = Objective(scheduler, learns_sigma(model), make_weighting(config.weighting))
        self.objective.timesteps = make_timesteps(self.timesteps, self.objective.levels)
        if config.balancing.name != "none":
            self._balance()

    def train(self, progress: bool = True) -> Any:
        """Train, and write the result to the run's directory; returns the method, whose result is on the model.

        Raises:
            InUse: another process trains in the directory.
            UserError, Interrupted: see `training.train`.
        """
        dataset, ddo = self.dataset, None
        with contextlib.ExitStack() as held:
            held.enter_context(alone_in(self.directory))
            if self.config.objective == "samples":
                dataset = self.load_fakes()
            elif self.config.objective == "ddo":
                ddo = (self.config.ddo, self.load_fakes())
            if self.assistant:
                held.enter_context(self.assistant.set(True))
            self._train(dataset, ddo, progress)
        return self.method

    def _train(self, dataset: Any, ddo: Any, progress: bool) -> None:
        config = self.config
        report = LiveReport(self.directory, config.training, self.config_text, config.validation.prompts)
        train(
            self.model,
            self.method,
            self.objective,
            dataset,
            self.config.training,
            self.directory,
            self.identity,
            self.config.data.horizontal_flip,
            self.config.data.num_workers,
            progress,
            lambda: write_run_config(self.directory, self.config_text),
            self.start_from,
            ddo,
            self.config.balancing,
            self._checks(),
            report,
        )

    def _checks(self) -> list[Check]:
        """What looks at the run while it trains, and at the base as it is now, an assistant on it for losses."""
        config, training, checks = self.config.validation, self.config.training, list[Check]()
        if config.loss_every or config.every:
            on_device(self.model, processes().device)
        if config.loss_every:
            held_out = load_held_out(self.config.data, self.dataset)
            size = max(1, training.batch_size // (processes().num_processes * training.gradient_accumulation_steps))
            checks.append(HeldOutLosses(config, held_out, self.model, self.objective, self.timesteps.range, size))
        if config.every:
            where, dtype = self.directory, getattr(torch, self.config.dtype)
            parts = (self._source, self.model, self.scheduler, where, dtype, self.assistant)
            checks.append(Validation(config, *parts))
        return checks

    def _load_assistant(self, source: str) -> Assistant | None:
        config = self.config
        if not config.assistant_lora:
            if sign := sign_of_distillation(source) if source else "":
                _LOGGER.warning(
                    "'%s' was distilled (%s), which training by the denoising loss takes back as it learns: give "
                    "--assistant_lora, or train the model that it was made from (docs/distilled.md).",
                    source,
                    sign,
                )
            return None
        if config.objective != "denoising":
            raise UserError(
                f"assistant_lora is for objective='denoising': objective='{config.objective}' learns from samples of "
                f"the model as it is, without it."
            )
        if not source or not is_pipeline(source):
            raise UserError(
                f"assistant_lora='{config.assistant_lora}' is read by a pipeline's loader, and "
                f"'{source or 'a model in Python'}' is no whole pipeline."
            )
        return Assistant(self.model, source, config.assistant_lora)

    def _balance(self) -> None:
        """Draw timesteps of each interval alike; a run that goes on must share the intervals."""
        config = self.config
        if config.objective == "ddo" or config.timesteps != TimestepsConfig():
            raise UserError(
                f"balancing='{config.balancing.name}' draws its own timesteps, for the denoising loss: leave out "
                f"timesteps and objective='ddo'."
            )
        sampler = make_intervals(config.balancing, self.objective)
        self.objective.timesteps = sampler
        self.identity["intervals"] = sampler.intervals

    def load_fakes(self) -> Fakes:
        """Samples of the model as training finds it, made first if they are not there."""
        model = on_device(self.model, processes().device)
        if self.start_from is not None:
            model = copy.deepcopy(model)
            load_learned(model, self.start_from)
        directory = Path(self.config.ddo.fakes or self.directory / "fakes")
        sampling = sampled_as_trained(self.config.ddo.sampling, self.scheduler)
        return load_fakes(directory, model, self.scheduler, self.dataset, sampling)


def _trained_size(latents: Any) -> list[int]:
    """Frames, height and width of most of a cache's latents: prompts lie on the tokens that they are trained on."""
    most = max(latents.groups(), key=len)
    return list(latents[most[0]]["image"].shape[1:])


def _check_memory(config: TrainConfig, is_frozen: bool, is_given: bool) -> None:
    """Refuse to hold a model in a way in which this job cannot have it."""
    memory = config.memory
    if memory == MemoryConfig():
        return
    if not is_frozen:
        raise UserError(f"method='{config.method}' trains the model's own weights; memory.* is of a model that stays.")
    if is_given:
        raise UserError("memory.* is of a model that is loaded here; hold the one that you give as you like.")
    if config.start_from and config.objective != "denoising":
        raise UserError(
            f"objective='{config.objective}' with start_from samples from a copy of the model: leave out memory.*."
        )
    if config.training.shard_base:
        raise UserError("training.shard_base and memory.* are two ways to hold one base: leave one out.")
    if memory.needs_checkpointing and not config.training.gradient_checkpointing:
        raise UserError(
            "memory.* of this kind needs training.gradient_checkpointing: without it the backward pass keeps all "
            "weights as the forward computed with them. Only bitsandbytes goes without."
        )
    if config.assistant_lora and (memory.layerwise_casting or memory.group_offload):
        raise UserError(
            "An assistant_lora is kept as the layers that it is on, with memory.layerwise_casting or "
            "memory.group_offload not as it computes: leave one out."
        )
    check_available(memory)


def _own_part(timesteps: TimestepsConfig, config: TrainConfig) -> TimestepsConfig:
    """The timesteps that are the denoiser's own.

    Raises:
        UserError: none of those that are asked for is; or samples are, which one of several denoisers does not make.
    """
    ranges, asked = denoiser_ranges(config.model), timesteps.range
    if len(ranges) > 1 and (config.objective != "denoising" or config.validation.every):
        raise UserError(
            f"'{config.model}' has several denoisers, and one of them alone makes no samples: leave out objective="
            f"'{config.objective}' and validation.every."
        )
    own = ranges.get(config.component, (0.0, 1.0))
    low, high = max(own[0], asked[0]), min(own[1], asked[1])
    if low >= high:
        raise UserError(
            f"timesteps.range={asked} has nothing of '{config.component}', which is for noise levels {own[0]:g} to "
            f"{own[1]:g}."
        )
    return replace(timesteps, range=[low, high])
