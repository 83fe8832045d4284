"""A comparison that finds its own rows: what a model gains by training, against all that may explain it away."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from stagepatch.checkpoints import load_denoiser
from stagepatch.core import UserError, as_user_error, check_unchanged, processes, read_yaml, write_text
from stagepatch.data import BUNDLED, cache_directory
from stagepatch.evaluation import Evaluator
from stagepatch.sampling import SamplingConfig
from stagepatch.studies.compare_config import CompareConfig, EntryConfig
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.studies.protocol_rows import FAKES_PER_IMAGE, default_entries
from stagepatch.training import PRESETS, DDOConfig, Run, TrainConfig, TrainingConfig, read_log

PLAN_NAME = "plan.yaml"
LEAST, MOST = (int(PRESETS["recommended"]["training"]["steps"]), 1000), (5000, 10_000)  # steps, images
_SEEDS = 3
_FILL = 0.8  # of the hours; the rest is for starting processes, features and the page
# A step forward and backward is 3 forwards; DDO's is of twice as many images, each also seen by the model as it was.
_DDO_STEP = 8 / 3
_BUDGET = ("training_seeds", "steps", "num_images")


@dataclass(frozen=True)
class Work:
    """What a plan's rows cost.

    Args:
        steps: fine-tuning steps, for a step of the budget and a training seed.
        images: sampled as the base samples, for an image of the budget and a training seed.
        images_once: the same of what is not made for every training seed.
    """

    steps: float
    images: float
    images_once: float


@dataclass(frozen=True)
class Budget:
    """What the hours are for.

    Args:
        hours: that it is expected to take.
    """

    steps: int
    num_images: int
    training_seeds: int
    hours: float


def plan_budget(seconds_per_step: float, seconds_per_image: float, hours: float, work: Work) -> Budget:
    """As many training seeds as the hours allow, up to 3; then steps and images together, from LEAST to MOST.

    Raises:
        UserError: the least plan takes longer.
    """

    def seconds(steps: float, images: float, seeds: int) -> float:
        training = seconds_per_step * steps * work.steps * seeds
        return training + seconds_per_image * images * (work.images * seeds + work.images_once)

    room = 3600.0 * hours * _FILL
    affordable = [seeds for seeds in range(_SEEDS, 0, -1) if seconds(*LEAST, seeds) <= room]
    if not affordable:
        needed = math.ceil(seconds(*LEAST, 1) / _FILL / 36.0) / 100.0
        raise UserError(
            f"hours={hours} are too few: on this machine the least, {LEAST[0]} steps with one training seed and "
            f"{LEAST[1]} images, takes {needed} hours."
        )
    seeds = affordable[0]
    least, most = seconds(*LEAST, seeds), seconds(*MOST, seeds)
    share = min(1.0, (room - least) / (most - least)) if most > least else 1.0
    steps, images = (int(low + share * (high - low)) for low, high in zip(LEAST, MOST, strict=True))
    return Budget(steps, images, seeds, seconds(steps, images, seeds) / 3600.0)


def work_of(entries: Sequence[EntryConfig], config: CompareConfig) -> Work:
    """Of some rows; all that trains costs what fine-tuning does, and DDO more. Rows of one training share it."""
    steps = images = once = 0.0
    trainings: list[EntryConfig] = []
    for entry in entries:
        own = len(config.sampling_seeds) * _sampling_cost(entry.sampling, config)
        if entry.method == "none":
            once += own
            continue
        images += own
        training = replace(entry, name="", sampling={}, control="")
        if training not in trainings:
            trainings.append(training)
            steps += _DDO_STEP if entry.objective == "ddo" else 1.0
    fakes = FAKES_PER_IMAGE * DDOConfig().sampling.num_inference_steps / config.sampling.num_inference_steps
    of_samples = [entry for entry in trainings if entry.objective != "denoising"]
    once += fakes * any(not entry.after for entry in of_samples)  # one set for all
    images += fakes * sum(bool(entry.after) for entry in of_samples)  # of the model that each goes on from
    return Work(steps, images, once)


def _sampling_cost(changes: dict[str, Any], config: CompareConfig) -> float:
    """Of an image, in the base's."""
    own = replace(config.sampling, **changes)

    def forwards(sampling: SamplingConfig) -> int:
        by_class, by_guide = (2 if on else 1 for on in (sampling.guidance_scale != 1.0, sampling.guide))
        return sampling.num_inference_steps * by_class * by_guide

    return forwards(own) / forwards(config.sampling)


def with_plan(config: CompareConfig) -> CompareConfig:
    """A config without entries, but with hours, gets its rows and its budget: from plan.yaml of its directory, or by a
    timing, which is then written there. Any other config is given back as it is.

    Raises:
        UserError: entries as well as hours, too few hours, or a plan of something else.
    """
    if not config.hours:
        return config
    if config.entries:
        raise UserError(f"hours={config.hours} plans rows of its own: leave out either hours or entries.")
    if config.dtype != "float32":
        raise UserError(
            f"hours={config.hours} trains the model's own weights too, which dtype='{config.dtype}' spoils."
        )
    if config.metric == "fid_held_out" and config.data.source not in BUNDLED and not config.data.held_out:
        print(f"No images of '{config.data.source}' are held out: the metric is fid_train.")
        config = replace(config, metric="fid_train")
    path, of = Path(config.output_dir) / PLAN_NAME, {name: getattr(config, name) for name in ("model", "hours")}
    of |= {"source": config.data.source, "learning_rate": config.training.learning_rate}
    if not path.exists():
        if (path.parent / "jobs").exists():
            raise UserError(f"'{path.parent}' holds a comparison of entries: give another output_dir.")
        _write_plan(path, of, config)
    plan = read_yaml(path, "plan")
    with as_user_error(f"'{path}' is no plan of this command: delete it", KeyError, TypeError, AttributeError):
        way_out = "Give another output_dir, or delete that file and the jobs beside it."
        check_unchanged(plan["of"], of, f"'{path}' is of another comparison", way_out, TrainingConfig())
        seeds, steps, num_images = (plan[name] for name in _BUDGET)
        entries = [EntryConfig(**entry) for entry in plan["entries"]]
        left_out = dict(plan["left_out"])
    for name, reason in left_out.items():
        print(f"Left out: {name}. {reason}")
    print(f"Plan: {steps} steps, {len(seeds)} training seed(s), {num_images} images ('{path}').")
    print(f"Rates are shares of the model's own: training.learning_rate={config.training.learning_rate:g}.")
    if len(seeds) < _SEEDS:
        print(f"The hours are enough for {len(seeds)} training seed(s); {_SEEDS} would say more of another run.")
    return replace(
        config,
        entries=entries,
        training_seeds=seeds,
        training=replace(config.training, steps=steps),
        sampling=replace(config.sampling, num_images=num_images),
    )


def _write_plan(path: Path, of: dict[str, Any], config: CompareConfig) -> None:
    trial = replace(config, training=replace(config.training, steps=LEAST[0]))
    entries, left_out = _possible(default_entries(config, *LEAST), trial)
    seconds = measure_seconds(config)
    print(f"A fine-tuning step takes {seconds[0]:.3g} s here, an image {seconds[1]:.3g} s.")
    budget = plan_budget(*seconds, config.hours, work_of(entries, config))
    entries = [
        entry for entry in default_entries(config, budget.steps, budget.num_images) if entry.name not in left_out
    ]
    plan = {
        "of": of,
        "expected_hours": round(budget.hours, 3),
        "training_seeds": list(range(budget.training_seeds)),
        "steps": budget.steps,
        "num_images": budget.num_images,
        "left_out": left_out,
        "entries": [{name: value for name, value in asdict(entry).items() if value} for entry in entries],
    }
    write_text(path, yaml.safe_dump(plan, sort_keys=False))


def _possible(entries: list[EntryConfig], config: CompareConfig) -> tuple[list[EntryConfig], dict[str, str]]:
    """Those that the model takes, and why it does not take the others. The base must be one of the former."""
    plan_jobs(replace(config, entries=entries[:1]))
    taken, left_out = entries[:1], {}
    for entry in entries[1:]:
        try:
            before = [each for each in taken if each.name == entry.after]
            plan_jobs(replace(config, entries=[*before, entry]))
            taken.append(entry)
        except UserError as error:
            left_out[entry.name] = str(error)
    return taken, left_out


def measure_seconds(config: CompareConfig) -> tuple[float, float]:
    """Seconds of a fine-tuning step, and of an image sampled as the base samples, on this machine."""
    cache = cache_directory(config.cache, config.output_dir)
    with tempfile.TemporaryDirectory() as directory:
        training = replace(
            config.training, steps=9, log_every=3, checkpoint_every=9, snapshot_every=0, tensorboard=False
        )
        run = TrainConfig("finetune", output_dir=directory, model=config.model, cache=str(cache), training=training)
        Run(replace(run, data=config.data, cache_batch_size=config.cache_batch_size)).train(progress=False)
        speed = max(record["images_per_second"] for record in read_log(Path(directory)))  # the first is a warm-up
    model, scheduler = load_denoiser(config.model)
    model.to(processes().device)
    evaluator = Evaluator.load(config.model, config.data, config.extractor, cache, config.held_out)
    batch = min(config.sampling.batch_size, config.sampling.num_images)

    def seconds(steps: int) -> float:
        sampling = replace(config.sampling, num_images=batch, batch_size=batch, num_inference_steps=steps)
        start = time.perf_counter()
        images = evaluator.sample(model, scheduler, sampling)
        evaluator.extractor(images)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    few, more = seconds(2), seconds(4)
    per_step = max(0.0, more - few) / 2.0  # decoding and features come once
    return training.batch_size / speed, max(more, few + per_step * (config.sampling.num_inference_steps - 2)) / batch
