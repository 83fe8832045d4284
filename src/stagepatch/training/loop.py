"""The training loop. It knows a model, a method, an objective and data; it never asks which."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from stagepatch.checkpoints import is_offloaded, on_device
from stagepatch.core import (
    CONFLICTS,
    GLOBAL,
    Interrupted,
    UserError,
    as_user_error,
    generator_for,
    processes,
    seed_for,
    whole_directory,
)
from stagepatch.diffusion import IntervalSampler, Objective
from stagepatch.families.registry import family_of
from stagepatch.methods import Method
from stagepatch.sampling import Fakes
from stagepatch.training.backward import backward, backward_apart
from stagepatch.training.balancing import bargained, project_conflicts
from stagepatch.training.balancing_config import BalancingConfig
from stagepatch.training.check import Check
from stagepatch.training.checkpoint import CHECKPOINT_NAME, TrainingState
from stagepatch.training.config import POSTHOC_EMA, SNAPSHOTS, TrainingConfig
from stagepatch.training.ddo_config import DDOConfig
from stagepatch.training.draws import Conditions, draw, load_batches
from stagepatch.training.faults import living, saved_at_fault
from stagepatch.training.live_report import LiveReport
from stagepatch.training.log import RunLog
from stagepatch.training.losses import DDOLoss, DenoisingLoss, UncertaintyLoss
from stagepatch.training.optimizers import learning_rate_of, make_optimizer, own_average
from stagepatch.training.posthoc_ema import PowerAverages
from stagepatch.training.sharding import check_whole, shard_base
from stagepatch.training.signals import StopSignals
from stagepatch.training.trackers import open_trackers

_LOGGER = logging.getLogger("stagepatch")


def train(
    model: nn.Module,
    method: Method,
    objective: Objective,
    dataset: Dataset[dict[str, Any]],
    config: TrainingConfig,
    directory: Path,
    identity: dict[str, Any] | None = None,
    horizontal_flip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    on_start: Callable[[], None] | None = None,
    start_from: Path | None = None,
    ddo: tuple[DDOConfig, Fakes] | None = None,
    balancing: BalancingConfig | None = None,
    checks: Sequence[Check] = (),
    report: LiveReport | None = None,
) -> None:
    """Train, and write the method's result to `directory`. A run that was stopped goes on where it was.

    Args:
        model: the denoiser; on return the method's result is on it.
        dataset: items {"image": [C, H, W], "label": int}; see `draws.draw` for what else they may hold. With a
            method `groups()`, indices of items of equal shape, every batch is out of one group.
        identity: further settings that a resumed run must share.
        horizontal_flip: mirror each image with probability ½.
        on_start: called by the main process when settings and checkpoint are accepted, before the first step.
        start_from: directory of what the same method learned before.
        ddo: tell training images from the model's own samples, in place of denoising alone.
        balancing: of the losses of the intervals that the objective draws its timesteps from.
        checks: what looks at the run now and then.
        report: a page on the run, kept up to date.

    Raises:
        UserError: sizes that do not divide, a loss that is not finite, or a checkpoint of other settings.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is written.
    """
    accelerator = _accelerator(config)
    num_intervals = _num_intervals(objective, balancing)
    _check_settings(config, accelerator.num_processes, num_intervals)
    if config.shard_base and (config.compile or ddo is not None or checks):
        raise UserError(
            "training.shard_base goes without compile, objective='ddo', validation.every and validation.loss_every: "
            "leave them out."
        )
    torch.manual_seed(seed_for(GLOBAL, config.seed))
    if config.shard_base:
        shard_base(model)
    else:
        on_device(model, accelerator.device)
    if config.gradient_checkpointing:
        _checkpoint_gradients(model, is_alone=ddo is None)
    groups = method.prepare(model)
    if start_from is not None:
        method.start_from(model, start_from)
    parameters = [parameter for group in groups for parameter in group["params"]]
    check_whole(parameters)
    rated = [{"params": group["params"], "lr": config.learning_rate * group["factor"]} for group in groups]
    trained = nn.ParameterList(parameters)
    fakes, of_loss = None, list[nn.Parameter]()
    loss = DenoisingLoss(model, method, objective, trained)
    if ddo is not None:  # before a checkpoint is loaded: it compares with where training started
        loss, fakes = DDOLoss(model, method, objective, trained, ddo[0]), ddo[1]
    elif balancing is not None and balancing.name == "uncertainty":
        loss = UncertaintyLoss(model, method, objective, trained, num_intervals).to(accelerator.device)
        of_loss = [loss.log_variances]
        rated.append({"params": of_loss, "lr": balancing.log_variance_learning_rate, "weight_decay": 0.0})
    optimizer = make_optimizer(rated, config)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = config.lr_scheduler if config.lr_scheduler != "constant" else "constant_with_warmup"
    # Its function alone: the rate follows from the iteration, so nothing of it is saved.
    rate_factor: Any = get_scheduler(schedule, optimizer, None, config.warmup_steps, config.steps).lr_lambdas[0]
    warmup = {"use_ema_warmup": config.ema_power > 0.0, "power": config.ema_power}
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True, **warmup) if config.ema_decay else None
    scaler: Any = accelerator.scaler or torch.amp.GradScaler(enabled=False)
    identity = {**(identity or {}), "training": config}
    posthoc = PowerAverages(parameters, config.posthoc_ema)
    learned = [*parameters, *of_loss]
    state = TrainingState(directory / CHECKPOINT_NAME, identity, learned, optimizer, ema, scaler, posthoc)
    start = state.load()

    def result() -> Sequence[Tensor] | None:
        """What is learned so far, where that is an average and not what trains."""
        return own_average(optimizer, parameters) if ema is None else ema.shadow_params

    if config.compile:
        model.compile()
    step = accelerator.prepare(loss, device_placement=[not is_offloaded(model)])
    share = (accelerator.process_index, accelerator.num_processes)
    loader = load_batches(dataset, config.batch_size, start, config.steps, config.seed, num_workers, *share)
    conditions = Conditions(model, dataset)
    is_main = accelerator.is_main_process
    if is_main and on_start is not None:
        on_start()
    trackers = open_trackers(config, directory, start, identity) if is_main else []
    # Under fp16 the scaler skips steps of gradients that are not finite; elsewhere such a step ruins what trains.
    checked = ["loss"] if scaler.is_enabled() else ["loss", "grad_norm"]
    totals: dict[str, Tensor] = {}
    since = time.perf_counter()
    # The iteration that what trains is of; -1 while a step is taken, and until all that is due then is done.
    settled = start

    def check_good(done: int) -> None:
        """Refuse to keep what is not finite."""
        sums = {name: float(value) for name, value in totals.items()}
        sums["trained weight"] = float(sum((each.detach() - each.detach()).sum() for each in parameters))  # 0, or NaN
        _check_finite(sums, [*checked, "trained weight"], done, directory, model)

    def keep() -> str:
        """At the fault of a step: save what is done, if it is good."""
        if is_main and settled > start:
            with contextlib.suppress(UserError):
                check_good(settled)
                state.save(settled)
        if not state.path.exists():
            return "There is no checkpoint yet: the same command begins anew."
        return f"The checkpoint is '{state.path}': give the same command again to go on from there."

    with (
        contextlib.closing(method),
        StopSignals() as signals,
        RunLog(directory, start, config.steps, trackers, is_main, progress, report) as log,
        saved_at_fault(keep),
    ):
        for iteration, batch in enumerate(living(loader), start):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(iteration)
            method.progress = iteration / config.steps
            here = (accelerator.device, accelerator.process_index)
            draws = draw(batch, config, objective, conditions, iteration, horizontal_flip, *here, fakes)
            parts = config.gradient_accumulation_steps
            if balancing is not None and balancing.name in ("pcgrad", "nash"):
                order = generator_for(torch.device("cpu"), CONFLICTS, config.seed, iteration)
                combine = partial(project_conflicts, generator=order) if balancing.name == "pcgrad" else bargained
                logged = backward_apart(step, draws, parts, accelerator, num_intervals, parameters, combine)
            else:
                logged = backward(step, draws, parts, accelerator)
            settled = -1
            scaler.unscale_(optimizer)
            logged["grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.step(parameters)
            posthoc.update(iteration + 1)
            totals = {name: totals.get(name, 0.0) + value for name, value in logged.items()}
            done = iteration + 1
            log.advance()

            if done % config.log_every == 0 or done == config.steps:
                count = done - max(start, (done - 1) // config.log_every * config.log_every)
                summed = accelerator.reduce(totals, "mean")
                means = {name: float(value.float() / count) for name, value in summed.items()}
                _check_finite(means, checked, done, directory, model)
                elapsed = time.perf_counter() - since
                speed = {"images_per_second": count * config.batch_size / elapsed, "lr": learning_rate_of(optimizer)}
                log.write({"iteration": done, **means, **speed})
                totals, since = {}, time.perf_counter()
                if reason := loss.too_far(means):
                    _LOGGER.warning("Training ended at iteration %d of %d: %s", done, config.steps, reason)
                    if is_main:
                        state.save(config.steps)  # so that the same command finds it done
                    accelerator.wait_for_everyone()
                    break
            stop = _stop_requested(signals, done, config, accelerator)
            is_due = done % config.checkpoint_every == 0 or done == config.steps or bool(stop)
            if is_due:
                check_good(done)
            if is_main:  # before the checkpoint: a run that goes on from it has the snapshots up to it
                _save_snapshots(method, parameters, result, posthoc, config, done, directory)
            if due := [check for check in checks if check.is_due(done, config.steps)]:
                with _averaged(parameters, result()), _at_rest(method):
                    for check in due:
                        check(model, done, log)
            if is_due:
                if is_main:
                    state.save(done)
                accelerator.wait_for_everyone()
            if stop and done < config.steps:
                raise Interrupted(
                    stop,
                    f"Stopped at iteration {done} of {config.steps}; the checkpoint is "
                    f"'{directory / CHECKPOINT_NAME}'. Give the same command again to go on from there.",
                )
            settled = done

    if (average := result()) is not None:
        _copy_to(parameters, average)
    if is_main:
        method.save(directory)
    accelerator.wait_for_everyone()


def _accelerator(config: TrainingConfig) -> Accelerator:
    if is_initialized() and AcceleratorState().mixed_precision != config.mixed_precision:
        # A process's first Accelerator would decide the precision of all later runs in it.
        AcceleratorState._reset_state()
    processes()
    with as_user_error(f"mixed_precision='{config.mixed_precision}' cannot be had here", ValueError):
        return Accelerator(mixed_precision=config.mixed_precision)


def _num_intervals(objective: Objective, balancing: BalancingConfig | None) -> int:
    """Intervals whose losses are balanced; 1 for none."""
    if balancing is None or balancing.name == "none":
        return 1
    if not isinstance(objective.timesteps, IntervalSampler):
        raise UserError(f"balancing='{balancing.name}' needs timesteps that are drawn by an IntervalSampler.")
    return len(objective.timesteps.intervals)


def _checkpoint_gradients(model: Any, is_alone: bool) -> None:
    """Let a model recompute its blocks in the backward pass.

    Raises:
        UserError: it cannot, or its forward is not the only one before the backward pass.
    """
    if not is_alone:
        raise UserError(
            "training.gradient_checkpointing needs a loss of one forward: objective='ddo' has several, after which "
            "blocks would be recomputed with another one's gate. Leave one out."
        )
    if not getattr(model, "_supports_gradient_checkpointing", False) or not family_of(type(model)).recomputes:
        raise UserError(f"{type(model).__name__} has no gradient checkpointing that computes the same: leave it out.")
    model.enable_gradient_checkpointing()


def _check_settings(config: TrainingConfig, num_processes: int, num_intervals: int) -> None:
    if config.steps < 1:
        raise UserError(f"steps={config.steps} must be at least 1.")
    if config.posthoc_ema and not config.snapshot_every:
        raise UserError(
            f"posthoc_ema={config.posthoc_ema} is saved with each snapshot, and there are none: set snapshot_every, "
            f"such as to a twentieth of steps."
        )
    parts = num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} does not divide by {num_processes} processes × "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}."
        )
    if config.batch_size // parts % num_intervals:
        raise UserError(
            f"batch_size={config.batch_size}, in {parts} part(s), holds no equal shares of {num_intervals} intervals: "
            f"give a multiple of {parts * num_intervals}."
        )


def _check_finite(
    values: dict[str, float], checked: Sequence[str], iteration: int, directory: Path, model: nn.Module
) -> None:
    odd = [name for name in checked if not math.isfinite(values.get(name, 0.0))]
    if not odd:
        return
    for name, weight in model.named_parameters():
        if not weight.requires_grad and weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(f"The model's own '{name}' holds numbers that are not finite: fetch or write it again.")
    kept = f"the last good checkpoint is '{directory / CHECKPOINT_NAME}'"
    if not (directory / CHECKPOINT_NAME).exists():
        kept = "no checkpoint was due before it"
    raise UserError(
        f"The {odd[0]} is {values[odd[0]]} near iteration {iteration}; {kept}. Try a lower learning_rate, a "
        f"max_grad_norm of 1, or mixed_precision 'no', in a new output_dir; and look for broken images."
    )


def _stop_requested(signals: StopSignals, done: int, config: TrainingConfig, accelerator: Accelerator) -> int:
    """The signal to stop for, 0 for none; all processes agree, at every log_every-th iteration."""
    if accelerator.num_processes == 1:
        return signals.received
    if done % config.log_every:
        return 0
    received = torch.tensor(float(signals.received), device=accelerator.device)
    return int(accelerator.gather(received.view(1)).max())


def _save_snapshots(
    method: Method,
    parameters: list[nn.Parameter],
    result: Callable[[], Sequence[Tensor] | None],
    posthoc: PowerAverages,
    config: TrainingConfig,
    done: int,
    directory: Path,
) -> None:
    """What is to be kept of this step: the result so far, and each average for post-hoc EMA."""
    is_due = config.snapshot_every > 0 and done % config.snapshot_every == 0
    if is_due:
        _save_result(method, parameters, result(), directory / SNAPSHOTS / f"{done:07d}")
    if is_due or done == config.steps:
        for sigma, average in posthoc.averages.items():
            _save_result(method, parameters, average, directory / POSTHOC_EMA / str(sigma) / f"{done:07d}")


def _save_result(
    method: Method, parameters: list[nn.Parameter], average: Sequence[Tensor] | None, directory: Path
) -> None:
    """Save the method's result, averaged where there is an average, and train on from where it was."""
    with _averaged(parameters, average), whole_directory(directory) as whole:
        method.save(whole)


@contextlib.contextmanager
def _averaged(parameters: list[nn.Parameter], average: Sequence[Tensor] | None) -> Iterator[None]:
    """What is trained is the average meanwhile, where there is one."""
    if average is None:
        yield
        return
    kept = [parameter.detach().cpu().clone() for parameter in parameters]
    _copy_to(parameters, average)
    try:
        yield
    finally:
        _copy_to(parameters, kept)


@torch.no_grad()
def _copy_to(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextlib.contextmanager
def _at_rest(method: Method) -> Iterator[None]:
    """A patch is in eval mode meanwhile, without its gate's noise."""
    patch: Any = getattr(method, "patch", None)
    if patch is None:
        yield
        return
    patch.eval()
    try:
        yield
    finally:
        patch.train()
