"""A diagnosis as it is read: in words, as tables, as pictures."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stagepatch.analysis.advice import Advice
from stagepatch.analysis.changes import Change
from stagepatch.analysis.diagnosis import Diagnosis, curve
from stagepatch.analysis.verdicts import LIMITS, RULE, STAGES, were_too_short
from stagepatch.report import Code, Picture, Prose, Section, Table, similarity_heatmaps

_CONVERGED = {
    "yes": "Converged, for this budget: no training lowers the held-out loss.",
    "no": "Not converged: training on lowers the held-out loss.",
    "unclear": "Whether it is converged cannot be told:",
}
_OTHER_DENSITY = {
    "yes": "With another density of timesteps it is converged too, for the loss weighted so.",
    "no": "For a loss that weighs high noise more it is not converged.",
    "unclear": "Whether it is converged for a loss that weighs high noise more cannot be told.",
}
_OVER_FITTED = {
    "yes": "Over-fitted: the loss on held-out images is above that on training images.",
    "no": "Not over-fitted.",
    "unclear": "Whether it is over-fitted cannot be told.",
}

_TOO_SHORT = (
    "each training raises even the loss on training images, so it had too few steps or too high a rate (more minutes, "
    "lower rates)."
)
_TOO_WIDE = "the intervals are too wide (more images)."


def diagnosis_in_words(found: Diagnosis) -> list[str]:
    """The verdicts, each with its numbers."""
    verdicts, rates = found.verdicts, zip(found.rates, found.longer, strict=True)
    each = "; ".join(f"{change} at {rate:g}" for rate, change in rates)
    converged = _CONVERGED[verdicts.converged]
    if verdicts.converged == "unclear":
        converged += f" {_TOO_SHORT if were_too_short(found.longer_trained) else _TOO_WIDE}"
    far = (
        ""
        if math.isnan(found.far.mean)
        else f" Mean cosine {found.far.mean:+.2f} ± {found.far.high - found.far.mean:.2f}."
    )
    return [
        LIMITS[verdicts.limited_by],
        f"{converged} Held-out loss after {found.steps} averaged steps: {each}.",
        f"{_OTHER_DENSITY[verdicts.converged_other_density]} That loss after as many steps: {found.density}.",
        f"{_OVER_FITTED[verdicts.over_fitted]} Held-out against training images: {found.gap}.",
        f"{STAGES[verdicts.stages]}{far}",
    ]


def diagnosis_sections(found: Diagnosis, advice: Sequence[Advice]) -> list[Section]:
    """The page, but for how it came about."""
    one, two = diagnosis_pictures(found).values()
    return [
        Prose("In short", " ".join(diagnosis_in_words(found))),
        _advice_table(advice),
        Code("The commands, in the same order", "\n".join(each.command for each in advice if each.command) + "\n"),
        one,
        _rooms(found),
        Prose("The rule", RULE),
        two,
        _methods(found),
        *([_free(found)] if found.free else []),
        _by_timestep(found),
    ]


def diagnosis_pictures(found: Diagnosis) -> dict[str, Picture]:
    """By the name of its file."""
    on_diagonal = found.gradients.cosine.clone()
    on_diagonal.diagonal().copy_(found.gradients.reliability)
    panels = {"cosine; diagonal: reliability": on_diagonal, "corrected for noise": found.gradients.corrected}
    return {
        "losses": Picture(
            "Losses, and what would lower them",
            _losses_figure(found),
            "Left, the mean loss at each timestep; middle, how far that on held-out images is above that on training "
            "images; right, what each training does to the held-out loss, below zero is better. Bands and bars: 95 % "
            "over images.",
        ),
        "gradients": Picture(
            "Do the stages conflict?",
            similarity_heatmaps(panels, [str(timestep) for timestep in found.timesteps], "timestep"),
            "Cosine between the mean gradients of two timesteps. Where the diagonal of the left panel is pale, the "
            "gradient is noise; on the right the noise is taken off, and what is noise for the greater part is grey.",
        ),
    }


def _changes(found: Diagnosis) -> list[tuple[str, Change]]:
    rows = [(f"trained on at {rate:g}", each) for rate, each in zip(found.rates, found.longer, strict=True)]
    rows += [(f"copies by range, {rate:g}", each) for rate, each in zip(found.rates, found.copies, strict=True)]
    rows.append(("other density, its own loss", found.density))
    if found.average is not None:
        rows.append(("mean of snapshots", found.average))
    return rows


def _losses_figure(found: Diagnosis) -> Figure:
    figure = Figure(figsize=(14.0, 4.0), layout="constrained")
    losses, gaps, rooms = figure.subplots(1, 3)
    axes: Any
    for label, values, color in (("training images", found.trained, "C0"), ("held-out images", found.held_out, "C1")):
        each = curve(values)
        mean, band = np.asarray(each["mean"]), 1.96 * np.nan_to_num(np.asarray(each["error"]))
        losses.plot(found.timesteps, mean, label=label, color=color)
        losses.fill_between(found.timesteps, mean - band, mean + band, color=color, alpha=0.2, linewidth=0)
    losses.set_ylabel("loss")
    if float(found.trained.mean(dim=1).min()) > 0.0 and float(found.held_out.mean(dim=1).min()) > 0.0:
        losses.set_yscale("log")
    losses.legend(fontsize=8)
    low, middle, high = (
        100.0 * np.asarray([getattr(gap, name) for gap in found.gaps]) for name in ("low", "mean", "high")
    )
    gaps.axhline(0.0, color="black", linewidth=0.8)
    gaps.plot(found.timesteps, middle, color="C1", marker="o", markersize=3)
    gaps.fill_between(found.timesteps, low, high, color="C1", alpha=0.2, linewidth=0)
    gaps.set_ylabel("held-out against training images [%]")
    for axes in (losses, gaps):
        axes.set_xlabel("timestep (0: image, last: noise)")
        axes.grid(alpha=0.25)
    rows = _changes(found)
    for place, (_, room) in enumerate(rows):
        error = [[100.0 * (room.mean - room.low)], [100.0 * (room.high - room.mean)]]
        color = "tab:green" if room.is_below(0.0) == "yes" else "tab:gray"
        rooms.barh(place, 100.0 * room.mean, xerr=np.nan_to_num(error), color=color, height=0.7)
    rooms.axvline(0.0, color="black", linewidth=0.8)
    rooms.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    rooms.invert_yaxis()
    rooms.set_xlabel("change of the held-out loss [%]")
    rooms.grid(axis="x", alpha=0.25)
    return figure


def _advice_table(advice: Sequence[Advice]) -> Table:
    rows = [[str(place), each.title, each.why, each.evidence] for place, each in enumerate(advice, 1)]
    return Table("What is worth trying, in order of worth", ["", "advice", "why", "evidence"], rows)


def _rooms(found: Diagnosis) -> Table:
    by_rate = zip(found.rates, found.longer, found.longer_trained, found.copies, strict=True)
    rows = [[f"{rate:g}", str(longer), str(trained), str(copies)] for rate, longer, trained, copies in by_rate]
    note = (
        f"{found.steps} steps, all weights, averaged, the rate falling to zero; of copies as many for all together. "
        f"Changes of the loss image by image, from the same noise, with intervals of 95 % over images that hold for "
        f"all rates together; they say nothing of another training run. Copies by range are compared with the least "
        f"held-out loss that one model has. Training images are some that a training may have seen."
    )
    columns = [
        "learning rate",
        "held-out loss, trained on",
        "training loss, trained on",
        "held-out loss, copies by range",
    ]
    return Table("Short trainings", columns, rows, note)


def _methods(found: Diagnosis) -> Table:
    rows = []
    for each in found.prospects:
        time = "–" if math.isnan(each.seconds) else _duration(each.seconds)
        memory = "–" if math.isnan(each.memory_gib) else f"{each.memory_gib:.2f} GiB"
        samples = _duration(each.sample_seconds) if each.sample_seconds else ""
        rows.append([each.label, f"{each.parameters:,}", time, memory, samples, each.gain, each.refused])
    columns = [
        "method",
        "parameters",
        "a step",
        "memory",
        "a sample of the model",
        "FID on the fashion bench",
        "refused",
    ]
    note = (
        "Parameters, time and memory are of this model on this machine: memory is the most allocated on an "
        "accelerator, without one that of the whole process. FID was measured on the fashion bench "
        "(docs/evidence.md), at 25 sampling steps, and not on your model. A copy for each of four ranges of timesteps "
        "costs fine-tuning's time and memory a step, four times its weights on disk, and gave −14.2 ± 0.5 % there."
    )
    return Table("What each method costs", columns, rows, note)


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{1000.0 * seconds:.3g} ms"


def _free(found: Diagnosis) -> Table:
    rows = [[each.label, f"{each.calls:g}", f"{each.fid:.3f}", str(each.change), each.options] for each in found.free]
    rows[0][3] = ""
    note = (
        "FID in the features of the bundled classifier, against held-out images; changes are paired by sampling seed, "
        f"with intervals of 95 % over three seeds, each for itself: of {len(found.free) - 1} such changes one may "
        "pass for a gain, or a loss, by chance."
    )
    return Table("Without training", ["sampling", "calls", "FID", "change", "options"], rows, note)


def _by_timestep(found: Diagnosis) -> Table:
    own, other = (curve(losses)["mean"] for losses in (found.trained, found.held_out))
    each = zip(found.timesteps, own, other, found.gaps, found.gradients.reliability.tolist(), strict=True)
    rows = [
        [str(t), f"{one:.4g}", f"{two:.4g}", str(gap), f"{reliability:.2f}"] for t, one, two, gap, reliability in each
    ]
    columns = ["timestep", "training images", "held-out images", "gap", "reliability of the gradient"]
    return Table("Each timestep", columns, rows)
