"""Measure one source of images against another: `stagepatch evaluate A B`."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.checkpoints import commits_of, denoiser_directory, find_model, sampled_fingerprint
from stagepatch.cli import config as configs
from stagepatch.cli.common import (
    RUN_CONFIG,
    bar_over,
    load_on_device,
    own_share,
    put_experts_on,
    put_on,
    write_run_config,
)
from stagepatch.cli.shown_samples import keep_shown, shown_samples
from stagepatch.core import UserError, as_user_error, processes, read_tensors, write_json
from stagepatch.data import Part
from stagepatch.evaluation import (
    TWO_SIDED,
    Collector,
    Dataset,
    FeatureExtractor,
    Measured,
    NamedSource,
    Reference,
    Shards,
    Side,
    StatisticsFile,
    begin_shards,
    captions_of,
    check_extractor,
    check_finite,
    chosen,
    comparison_table,
    dataset_shards,
    direction_note,
    estimate,
    finish_shards,
    has_images,
    load_extractor,
    load_images,
    load_others,
    metric_names,
    name_source,
    outputs_of,
    read_statistics,
    sampling_conditions,
    write_statistics,
)
from stagepatch.families import sample_shape
from stagepatch.report import Comparison, KeyValues, Section, Table, print_table, provenance, write_page
from stagepatch.sampling import SamplingConfig, attach_guide, generate

_IN_SHARD = 256


@dataclass
class _Shown:
    """The first samples of a model from the noise of A's first seed.

    Args:
        shape: of that noise.
    """

    path: Path
    seed: int
    shape: tuple[int, ...]


def evaluate_sources(config: configs.EvaluateConfig, resolved: str) -> None:
    """Metrics of A's images against B's, for each seed where A is a model; statistics of A's, where wanted."""
    if config.patch or config.schedule:
        raise UserError(f"Of two sources, say what is on a model as {config.model}+{config.patch or config.schedule}.")
    if config.save_statistics and not config.save_statistics.endswith(".npz"):
        raise UserError(
            f"Statistics are written as .npz: --save_statistics='{config.save_statistics}' ends otherwise."
        )
    directory = Path(config.output_dir)
    keys = [*chosen(config.metrics or TWO_SIDED)]
    collector = _collector(config, keys)
    named = [name_source(text) for text in (config.model, config.against) if text]
    if config.save_statistics and named[0].kind == "statistics":
        raise UserError(f"'{config.model}' holds statistics already: --save_statistics is of images, or of a model.")
    images = [load_images(each, config.data) if each.kind == "images" else None for each in named]
    for dataset in images:  # what does not fit is refused here, not when all is sampled
        if dataset is not None:
            collector(dataset[0]["image"].unsqueeze(0))
    given = load_images(name_source(config.conditions), config.data) if config.conditions else None
    seeds, notes = (config.seeds, [max(config.seeds) + 1]), list[str]()
    sides: dict[int, list[Side]] = {}
    shown: list[_Shown] | None = [] if [each.kind for each in named] == ["model", "model"] else None
    order = ("statistics", "images", "model")  # what is quickly refused comes first
    for number in sorted(range(len(named)), key=lambda number: order.index(named[number].kind)):
        source, dataset = named[number], images[number]
        if source.kind == "statistics":
            sides[number] = [_of_statistics(source, config, collector, notes)]
        elif dataset is not None:
            sides[number] = [_of_images(source, dataset, config, collector)]
        else:
            other = 1 - number if len(named) > 1 else number
            conditions = (given, config.conditions) if config.conditions else (images[other], named[other].text)
            kept = directory / "features" / "ab"[number]
            sides[number] = _of_model(source, config, collector, conditions, seeds[number], kept, notes, shown)
    processes().wait_for_everyone()
    if not processes().is_main_process:
        return
    write_run_config(directory, resolved)
    if config.save_statistics:
        _save(Path(config.save_statistics), sides[0][0], collector)
    if config.against:
        samples = [] if shown is None else _samples(shown, (named[0].text, named[1].text))
        _measure(sides[0], sides[1][0], config, collector, keys, notes, samples, resolved)
    for letter in "ab":
        finish_shards(directory / "features" / letter)


def _collector(config: configs.EvaluateConfig, keys: list[str]) -> Collector:
    """What the metrics need, and for statistics that are kept the features of sFID, where the extractor has them."""
    wanted = {metric.of for metric in chosen(keys).values()} | {"features"}
    wanted |= {"spatial"} if config.save_statistics else set()
    extractor = load_extractor(config.extractor)
    outputs = [name for name in outputs_of(extractor) if name in wanted]
    return Collector(extractor, outputs, load_others(wanted, is_optional="all" in config.metrics))


def _of_statistics(
    source: NamedSource, config: configs.EvaluateConfig, collector: Collector, notes: list[str]
) -> Side:
    path = Path(source.path)
    file = read_statistics(path)
    notes += [note] if (note := check_extractor(path, file, collector.extractor)) else []
    facts = {"images": file.statistics["features"].count or "not said", "extracted by": file.extractor or "not said"}
    parts = None
    if has_images(path):  # as ADM's reference batches
        parts = _of_images(source, load_images(source, config.data), config, collector).parts
        notes.append(f"Of '{source.text}', the statistics are the file's own; the rest is of the images in it.")
    return Side(source.text, parts, file.statistics, _facts(source, **facts))


def _of_images(source: NamedSource, dataset: Dataset, config: configs.EvaluateConfig, collector: Collector) -> Side:
    captions = captions_of(dataset) if "clip" in collector.others else []
    captions = captions if any(captions) else []
    with bar_over(own_share(len(dataset)), f"features of {source.text}") as on_batch:
        parts = dataset_shards(dataset, collector, captions, on_batch=on_batch)
        parts.make_own(on_batch)
    facts: dict[str, Any] = {"images": len(dataset), "size": [*dataset[0]["image"].shape]}
    if source.split:
        facts["split"] = source.split
        facts["held_out"] = config.data.held_out if isinstance(dataset, Part) else "the data set's own"
    return Side(source.text, parts, facts=_facts(source, **facts))


def _of_model(
    source: NamedSource,
    config: configs.EvaluateConfig,
    collector: Collector,
    conditions: tuple[Dataset | None, str],
    seeds: list[int],
    kept: Path,
    notes: list[str],
    shown: list[_Shown] | None,
) -> list[Side]:
    """Sampled and collected, for each seed.

    Args:
        shown: takes its first samples, A's before B's; None where they are not compared.
    """
    dtype, sampling = getattr(torch, config.dtype), config.sampling
    model, scheduler = load_on_device(source.path, dtype, config.memory)
    attach_guide(model, scheduler, sampling)
    if Path(source.learned).suffix in (".yaml", ".yml"):
        sampling = put_experts_on(source.learned, model, scheduler, sampling)
    elif source.learned:
        put_on(source.learned, config.patch_scale, model)
    given = sampling_conditions(source.path, model, sampling.num_images, *conditions, dtype)
    notes += [given.said] if given.said else []
    if given.latents is None:
        collector(torch.zeros(1, *sample_shape(model)))
    settings = {
        "source": source.text,
        "weights": weights_fingerprint(source.path),
        "learned": learned_fingerprint(source.learned),
        "conditions": given.digest,
        "collected": collector.fingerprint,
        "dtype": config.dtype,
        "memory": config.memory,
        "patch_scale": config.patch_scale,
        "sampling": sampling,
    }
    begin_shards(kept, settings)
    latents = {} if given.latents is None else vars(given.latents)
    shape = sample_shape(model) if given.latents is None else given.latents.shape
    first = _Shown(kept / "shown.safetensors", shown[0].seed if shown else seeds[0], tuple(shape))
    with bar_over(own_share(sampling.num_images) * len(seeds), f"sampling {source.text}") as on_batch:

        def shards(seed: int) -> Shards:
            own = replace(sampling, seed=seed)

            def make(numbers: range) -> dict[str, Tensor]:
                options: dict[str, Any] = {"on_batch": on_batch, "numbers": numbers, **latents}
                images = generate(model, scheduler, own, given.labels, **options)
                if shown == [] and seed == seeds[0] and numbers.start == 0:
                    keep_shown(first.path, images)
                found = collector(images, [given.captions[number] for number in numbers] if given.captions else [])
                with as_user_error(f"'{source.text}'", UserError):
                    check_finite(found["features"])
                return found

            return Shards(kept / f"seed-{seed}", sampling.num_images, make, shard_size(sampling))

        found = [shards(seed) for seed in seeds]
        for each in found:
            each.make_own(on_batch)
    if shown is not None:
        if shown and shown[0].shape == first.shape and processes().is_main_process:  # B, whose own noise is other
            count = min(sampling.num_images, len(read_tensors(shown[0].path)[0]["images"]))
            own = replace(sampling, seed=first.seed)
            keep_shown(first.path, generate(model, scheduler, own, given.labels, numbers=range(count), **latents))
        shown.append(first)

    def lost(numbers: range) -> dict[str, Tensor]:  # so that the model need not stay in memory
        raise UserError(f"What was collected of '{source.text}' cannot be read back: give the same command again.")

    kept_parts = [Shards(each.directory, each.count, lost, each.size) for each in found]
    facts = {"images": sampling.num_images, "weights": settings["weights"], "conditions": given.said}
    facts |= {"learned": settings["learned"]} if source.learned else {}
    return [
        Side(source.text, each, facts=_facts(source, **facts, seed=seed))
        for seed, each in zip(seeds, kept_parts, strict=True)
    ]


def _samples(shown: list[_Shown], names: tuple[str, str]) -> list[Comparison]:
    one, other = shown
    return shown_samples("Samples", (one.path, other.path), names) if one.shape == other.shape else []


def _facts(source: NamedSource, **facts: Any) -> dict[str, Any]:
    return {"source": source.text, "kind": source.kind, **facts}


def _save(path: Path, side: Side, collector: Collector) -> None:
    extractor = collector.extractor
    with as_user_error(f"'{side.name}'", UserError):
        found = {name: side.statistics(name) for name in ("features", "spatial") if name in collector.outputs}
    statistics = {name: each for name, each in found.items() if each is not None}
    preprocessing = getattr(extractor, "preprocessing", "")
    write_statistics(path, StatisticsFile(statistics, extractor.name, extractor.fingerprint, preprocessing, side.name))
    print(f"Statistics of {side.count:,} images are in '{path}'.")


def _measure(
    ones: list[Side],
    other: Side,
    config: configs.EvaluateConfig,
    collector: Collector,
    keys: list[str],
    notes: list[str],
    samples: list[Comparison],
    resolved: str,
) -> None:
    reference, extractor = Reference(other, keys), collector.extractor
    found = [reference.measure(one, with_intervals=len(ones) == 1) for one in ones]
    measured = Measured([metrics for metrics, _ in found], torch.empty(0), found[0][1] if len(found) == 1 else {})
    labels = metric_names(extractor.name)
    if left_out := [labels[key] for key in keys if key not in measured.metrics[0]]:
        notes.append(
            f"Left out, since they need more than these sources and this extractor give: {', '.join(left_out)}."
        )
    if not measured.metrics[0]:
        raise UserError(f"Nothing can be measured of these two. {notes[-1]}")
    if (moments := reference.moments()) is not None:
        each = {side.name: replace(moments, count=side.count).note() for side in (ones[0], other)}
        notes += [f"'{name}': {note}" for name, note in each.items() if note]
    sizes = [side.facts["size"] for side in (ones[0], other) if "size" in side.facts]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        notes.append(f"The images differ in size, {sizes[0]} and {sizes[1]} [C, H, W]: the extractor resizes each.")
    found_intervals = {key: estimate(measured, key).interval for key in measured.metrics[0]}
    intervals = {key: [*ends] for key, ends in found_intervals.items() if not math.isnan(ends[0])}
    if intervals:
        over = f"{len(ones)} sampling seeds (Student's t)" if len(ones) > 1 else "A's images (20 groups of them)"
        notes.insert(0, f"In brackets 95% intervals over {over}; B's images are taken as they are.")
    directory = Path(config.output_dir)
    result: dict[str, Any] = {
        "a": ones[0].facts,
        "b": other.facts,
        "extractor": {
            "name": extractor.name,
            "fingerprint": extractor.fingerprint,
            "preprocessing": getattr(extractor, "preprocessing", ""),
        },
        **loaded_by(
            [name_source(text).path for text in (config.model, config.against, config.conditions) if text],
            [extractor, *collector.others.values()],
        ),
        "sampling": asdict(config.sampling),
        "seeds": [one.facts["seed"] for one in ones if "seed" in one.facts],
        "metrics": measured.metrics,
        "intervals": intervals,
        "notes": notes,
    }
    write_json(directory / "metrics.json", result)
    columns, rows = comparison_table(measured, None, extractor.name)
    counts = " against ".join(f"{side.facts['images']} of {side.name}" for side in (ones[0], other))
    print_table([columns[0], ones[0].name], rows, f"Images: {counts}")
    said = [direction_note(measured.metrics[0]), *notes]
    print("\n".join(said))
    sections: list[Section] = [
        Table("Metrics", ["metric", ones[0].name], rows, " ".join(said)),
        *samples,
        *(KeyValues(f"{letter}: {side.name}", _texts(side.facts)) for letter, side in (("A", ones[0]), ("B", other))),
        KeyValues("Extractor", _texts(result["extractor"])),
        *([KeyValues("From the Hub", result["loaded"])] if "loaded" in result else []),
        *provenance(resolved, f"stagepatch evaluate --config {directory / RUN_CONFIG}\n"),
    ]
    lead = f"Images of '{ones[0].name}' (A) against those of '{other.name}' (B)."
    write_page(directory / "report.html", "stagepatch evaluate", lead, sections)
    files = f"'{directory / 'metrics.json'}'; report: '{directory / 'report.html'}'"
    print(f"All figures, and what was measured, are in {files}.")


def loaded_by(names: list[str], extractors: Iterable[FeatureExtractor]) -> dict[str, dict[str, str]]:
    """What a result records of what was loaded from the Hub: 'loaded', commits by name; nothing where nothing was."""
    found = commits_of([*names, *(getattr(extractor, "source", "") for extractor in extractors)])
    return {"loaded": found} if found else {}


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value not in ("", None)}


def shard_size(sampling: SamplingConfig) -> int:
    """Images in a file: whole batches, so that each is denoised beside the same others wherever a run was stopped."""
    return math.ceil(_IN_SHARD / sampling.batch_size) * sampling.batch_size


def weights_fingerprint(model: str) -> str:
    """Changes with the files of a denoiser; they are not read wholly."""
    return sampled_fingerprint(denoiser_directory(find_model(model)))


def learned_fingerprint(path: str) -> str:
    """Changes with what a method learned, or with a file of experts; '' for none."""
    if not path:
        return ""
    learned = Path(path)
    return sampled_fingerprint(learned) if learned.is_dir() else hashlib.sha256(learned.read_bytes()).hexdigest()
