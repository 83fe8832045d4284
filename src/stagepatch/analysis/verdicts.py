"""What the numbers of a diagnosis say, by rules that are told in words with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stagepatch.analysis.changes import Answer, Change, any_below
from stagepatch.analysis.gradients import GradientSimilarity

LEAST_CHANGE = 0.002  # of the loss: with less, nothing is worth a training
LEAST_GAP = 0.01
_ALIKE = 0.5  # cosine

Limit = Literal["training", "data", "capacity", "none_found", "unclear"]
Stages = Literal["conflict", "differ", "agree", "unclear"]


@dataclass
class Verdicts:
    """What a model is limited by.

    Args:
        converged: whether none of the trainings lowers the held-out loss, timesteps alike; unclear too where each of
            them raised the loss on training images, for which its rate was too high or its steps too few.
        converged_other_density: the same of one with another density of t, for the loss that it weighs so.
        over_fitted: whether the loss on held-out images is above that on training images.
        shares_too_little: whether copies of the model, each for a quarter of the timesteps, lower the held-out loss
            under the least that one model has; unclear too where `converged` is so for that.
        limited_by: see `decide`.
        stages: see `how_stages_agree`.
    """

    converged: Answer
    converged_other_density: Answer
    over_fitted: Answer
    shares_too_little: Answer
    limited_by: Limit
    stages: Stages


_OTHER: dict[Answer, Answer] = {"yes": "no", "no": "yes", "unclear": "unclear"}


def judge(
    gap: Change,
    longer: Sequence[Change],
    longer_trained: Sequence[Change],
    density: Change,
    copies: Sequence[Change],
    stages: Stages,
) -> Verdicts:
    """The verdicts, from relative changes of the held-out loss.

    Args:
        gap: from training to held-out images.
        longer: by each training, timesteps alike; and the same of the loss on training images.
        density: by the one with another density, of the loss weighted by it.
        copies: by copies for ranges of the timesteps, to the least that one model has.
    """
    found = [any_below(list(changes), -LEAST_CHANGE) for changes in (longer, copies, [density])]
    if were_too_short(longer_trained):  # then a "no" says nothing
        found = ["unclear" if answer == "no" else answer for answer in found]
    lowers, too_little, other_lowers = found
    over_fitted = gap.is_above(LEAST_GAP)
    room = max(-each.mean for each in longer)
    limit = decide(lowers, room, over_fitted, gap.mean, too_little)
    return Verdicts(_OTHER[lowers], _OTHER[other_lowers], over_fitted, too_little, limit, stages)


def were_too_short(longer_trained: Sequence[Change]) -> bool:
    """Whether each training raised even the loss on training images: its steps too few, or its rate too high."""
    return min(each.mean for each in longer_trained) > LEAST_CHANGE


def decide(lowers: Answer, room: float, over_fitted: Answer, gap: float, too_little: Answer) -> Limit:
    """What the model is limited by.

    More training and more data first, by the larger of what they could give; capacity where neither is one that is
    told from nothing, since of a model that still learns, or that knows its images by heart, copies say nothing.

    Args:
        lowers: whether training on lowers the held-out loss, and `room`, by how much.
        over_fitted: whether there is a gap to training images, and how large a one.
        too_little: whether copies by range go below the least that one model has.
    """
    if lowers == "yes" and (over_fitted != "yes" or room >= gap):
        return "training"
    if over_fitted == "yes":
        return "data"
    if too_little == "yes":
        return "capacity"
    return "none_found" if {lowers, over_fitted, too_little} == {"no"} else "unclear"


RULE = (
    f"Limited by training: a training lowers the held-out loss by {100 * LEAST_CHANGE:g} % or more. By data: the loss "
    f"on held-out images is above that on training images by {100 * LEAST_GAP:g} % or more; of the two, the larger. "
    f"By capacity: neither, and four copies of the model, each trained on a quarter of the timesteps with as many "
    f"images of it, bring the held-out loss {100 * LEAST_CHANGE:g} % or more under the least that one model has. In "
    f"each case all of an interval of 95 % must say so. Nothing found: all of each interval says the contrary. What "
    f"is left then is noise that no model can predict, or room that only a wider or deeper model would show: these "
    f"two cannot be told apart here. Else it cannot be told; more images narrow the intervals, and where each "
    f"training raises even the loss on training images, for its rate or its few steps, it tells nothing, nor do the "
    f"copies, nor another density. The limits of {100 * LEAST_CHANGE:g} % and {100 * LEAST_GAP:g} % are our choice: "
    f"on the fashion bench, changes of the loss of a tenth of a percent went with no change of FID."
)
LIMITS: dict[Limit, str] = {
    "training": "Limited by training: it still learns, and what it learns holds for images that it has not seen.",
    "data": "Limited by data: it knows its training images better than others; more capacity would know them better "
    "still.",
    "capacity": "Limited by capacity: its stages share weights that each would rather have for itself.",
    "none_found": "No limit found: neither training, nor data, nor weights for each stage lower the loss.",
    "unclear": "It cannot be told what limits it: intervals are too wide, or trainings too short.",
}
STAGES: dict[Stages, str] = {
    "conflict": "The stages conflict: timesteps far apart pull the weights in opposite directions.",
    "differ": "The stages differ: timesteps far apart pull the weights in unrelated directions.",
    "agree": "The stages agree: timesteps far apart pull the weights in one direction.",
    "unclear": "Whether the stages conflict cannot be told: their gradients are noise for the greater part, as they "
    "are where training has come to rest.",
}


def far_cosine(found: GradientSimilarity) -> Change:
    """The mean cosine, corrected for noise, of timesteps at least half of all apart, ± two standard errors of one
    pair; NaN where less than a quarter of these pairs can be corrected."""
    places = torch.arange(len(found.timesteps))
    far = found.corrected[(places.unsqueeze(1) - places) >= len(places) / 2]
    known = far[~far.isnan()]
    if len(known) < max(1.0, len(far) / 4.0):
        return Change(torch.nan, torch.nan, torch.nan)
    reliable = found.reliability[found.reliability >= 0.5]
    mean, error = float(known.mean()), 2.0 * found.error / float(reliable.mean())
    return Change(mean, mean - error, mean + error)


def how_stages_agree(far: Change) -> Stages:
    """By the cosine of far timesteps: in conflict if it is below 0, else differing below ½, else agreeing."""
    if far.is_below(0.0) == "yes":
        return "conflict"
    if far.is_above(_ALIKE) == "yes":
        return "agree"
    return "unclear" if far.mean != far.mean else "differ"
