"""What a model card has besides: samples, figures, the words that call up what was learned."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from stagepatch.evaluation.metrics import metric_names
from stagepatch.methods.lora_card import rows

_TASK = {True: "text-to-image", False: "unconditional-image-generation"}


@dataclass(frozen=True)
class Figures:
    """What `stagepatch evaluate` measured.

    Args:
        base, learned: a dict of metrics for each seed.
        data: that they were measured against.
        features: the extractor's name.
    """

    base: list[dict[str, float]]
    learned: list[dict[str, float]]
    data: str
    features: str


@dataclass(frozen=True)
class Extras:
    """What is added to a card.

    Args:
        title: of the repository, for its figures.
        prompt: words that call up what was learned.
        samples: pictures in the folder, and the caption of each.
        pictures: further ones in the folder, and what they show.
        files: further files in the folder, and what they are.
        figures: none, where nothing was measured.
    """

    title: str
    prompt: str = ""
    samples: Sequence[tuple[str, str]] = ()
    pictures: Sequence[tuple[str, str]] = ()
    files: dict[str, str] = field(default_factory=dict)
    figures: Figures | None = None


def extended_card(text: str, extras: Extras) -> str:
    """A card with more: in its front a widget with samples, `instance_prompt`, and results in the Hub's model-index;
    in its text the samples, pictures, figures and files.
    """
    card = ModelCard(text)
    data: Any = card.data
    is_prompted = bool(extras.prompt) or any(caption for _, caption in extras.samples)
    data.pipeline_tag = _TASK[is_prompted]
    if extras.prompt:
        data["instance_prompt"] = extras.prompt
        card.text += f"\n## Trigger words\nUse `{extras.prompt}` in the prompt.\n"
    shown = extras.samples or [(file, "") for file, _ in extras.pictures]
    if shown:
        data["widget"] = [{"text": caption or "-", "output": {"url": file}} for file, caption in shown]
    if extras.samples:
        card.text += "\n## Samples\n<Gallery />\n"
    for file, words in extras.pictures:
        card.text += f"\n![{words}]({file})\n\n*{words}*\n"
    if extras.figures is not None:
        data.model_name, data.eval_results = extras.title, _results(extras.figures, _TASK[is_prompted])
        card.text += "\n" + _table(extras.figures)
    if extras.files:
        card.text += "\n## Files\n" + rows({f"`{file}`": words for file, words in extras.files.items()}) + "\n"
    return str(card)


def _results(figures: Figures, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type="image-folder",
            dataset_name=figures.data,
            metric_type=key,
            metric_name=label,
            metric_value=round(_mean(figures.learned, key), 6),
        )
        for key, label in _measured(figures)
    ]


def _table(figures: Figures) -> str:
    lines = ["| metric | base | with it |", "| --- | ---: | ---: |"]
    for key, label in _measured(figures):
        lines.append(f"| {label} | {_mean(figures.base, key):.4g} | {_mean(figures.learned, key):.4g} |")
    seeds = len(figures.learned)
    return f"## Figures\nAgainst {figures.data}; means of {seeds} sampling seed(s).\n\n" + "\n".join(lines) + "\n"


def _measured(figures: Figures) -> list[tuple[str, str]]:
    names = metric_names(figures.features)
    return [(key, label) for key, label in names.items() if key in figures.base[0] and key in figures.learned[0]]


def _mean(values: list[dict[str, float]], key: str) -> float:
    return statistics.fmean(value[key] for value in values)
