"""Metrics of which image lies near which: distances by rows, so that no matrix of all pairs is ever held, and to a
block of the others at a time, which `torch.cdist` copies several times.

Of more than NEIGHBOURS samples or references, so many spread evenly over them stand for all in `precision`, `recall`,
`density` and `coverage`: the distances grow with the product of the two, and the radii, so the values too, with how
many there are.

How sure `precision` and `density` are, means over the samples, is had by leaving some out; `recall` and `coverage`, of
which any sample may decide, from halves of them; `coverage`'s size from which samples its balls hold in common.
"""

from collections.abc import Callable, Iterator

import torch
from scipy.stats import binom
from torch import Tensor

from stagepatch.evaluation.halves import spread_by, without_by_halves
from stagepatch.sampling import spread

NEIGHBOURS = 10_000
MEMORISED = 0.05
_ROWS = 256
_BLOCK = 512
_TAPER = 7


def precision(features: Tensor, reference: Tensor, k: int = 3, rows: int = _ROWS) -> float:
    """Share of samples within the k-th-neighbour radius of some reference (arXiv 1904.06991, Eq. 1, 2)."""
    return float((_balls_around(features, reference, k, rows) > 0).double().mean())


def recall(features: Tensor, reference: Tensor, k: int = 3, rows: int = _ROWS) -> float:
    """Share of the reference within the k-th-neighbour radius of some sample; see `precision`."""
    return precision(reference, features, k, rows)


def density(features: Tensor, reference: Tensor, k: int = 5, rows: int = _ROWS) -> float:
    """How many references' k-th-neighbour balls a sample lies in, on average, over k (arXiv 2002.09797, Eq. 4)."""
    return float(_balls_around(features, reference, k, rows).double().mean() / k)


def coverage(features: Tensor, reference: Tensor, k: int = 5, rows: int = _ROWS) -> float:
    """Share of references with a sample within their k-th-neighbour radius (arXiv 2002.09797, Eq. 5)."""
    features, reference = at_most(NEIGHBOURS, features), at_most(NEIGHBOURS, reference)
    radii, parts = _radii(reference, k, rows).split(rows), _distances(reference, features, rows)
    covered = [int((part <= own.unsqueeze(1)).any(dim=1).sum()) for part, own in zip(parts, radii, strict=True)]
    return sum(covered) / len(reference)


def precision_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """`precision` without each group of samples."""
    return _means_without(_balls_around(features, reference, 3) > 0, at_most(NEIGHBOURS, groups))


def density_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """`density` without each group of samples."""
    return _means_without(_balls_around(features, reference, 5) / 5, at_most(NEIGHBOURS, groups))


def coverage_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """`coverage` without each group of samples: their signs from halves, their size by `variance_of_coverage`."""
    rows = at_most(NEIGHBOURS, features), at_most(NEIGHBOURS, reference)
    without = without_by_halves(_coverage_of_halves, *rows, at_most(NEIGHBOURS, groups))
    return spread_by(variance_of_coverage(*rows), without)


def recall_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """`recall` without each group of samples, see `without_by_halves`."""
    rows = at_most(NEIGHBOURS, features), at_most(NEIGHBOURS, reference)
    return without_by_halves(_recall_of_halves, *rows, at_most(NEIGHBOURS, groups))


def variance_of_coverage(features: Tensor, reference: Tensor, k: int = 5) -> float:
    """Variance of `coverage` over sets of as many samples [B, F], from one of them; the reference [R, F] is given.

    Of Poisson counts, P(two balls are empty) − P(one is) P(other is) is the mean of −(−1)^c where both hold the same
    c ≥ 1 samples, and of 0 elsewhere; a ball with itself is such a pair. The alternating sum is cut off gently, as in
    Efron & Thisted, "Estimating the number of unseen species" (1976). That the samples are B takes off what all balls
    have in common, to first order.
    """
    generator = torch.Generator().manual_seed(0)
    names = torch.randint(2**62, (len(features),), generator=generator)  # and a set's name is the sum of its samples'
    count, sets = torch.empty(2, len(reference), dtype=torch.long)
    places, radii = torch.arange(len(reference)).split(_ROWS), _radii(reference, k, _ROWS)
    for rows, part in zip(places, _distances(reference, features, _ROWS), strict=True):
        near = part <= radii[rows].unsqueeze(1)
        count[rows], sets[rows] = near.sum(dim=1), (near * names).sum(dim=1)
    _, which, alike = torch.unique(sets, return_inverse=True, return_counts=True)
    signs = torch.tensor([0.0, *(-((-1) ** c) * binom.sf(c - 1, _TAPER, 0.5) for c in range(1, _TAPER + 2))]).double()
    pairs = (signs[count.clamp(max=_TAPER + 1)] * alike[which]).sum()
    common = (count == 1).sum().double() ** 2 / len(features)
    return float(pairs - common) / len(reference) ** 2


def nearest_distance(images: Tensor, reference: Tensor, rows: int = 1024) -> Tensor:
    """Euclidean distance of each row [B, ...], image or features, to the nearest of the reference [R, ...]: [B]."""
    flat, blocks = images.flatten(1), reference.flatten(1).split(_BLOCK)
    nearest = flat.new_empty(len(flat))
    for own, part in zip(nearest.split(rows), flat.split(rows), strict=True):
        own.copy_(torch.stack([torch.cdist(part, block).amin(dim=1) for block in blocks]).amin(dim=0))
    return nearest


def median(values: Tensor) -> float:
    """Median of a number an image, [B]; of two in the middle the lower one."""
    return float(values.median())


def memorised(nearest: Tensor, held_out: Tensor) -> float:
    """Share of samples that lie closer to a training image than all but 1 in 20 held-out images do.

    So it is 0.05 of samples that are as far from the training images as new images of the same kind, more where
    training images are copied, and nothing about samples that are far from all images.

    Args:
        nearest: [B], distance of each sample to the nearest training image.
        held_out: [H], the same of images that were not trained on.
    """
    return float(_is_memorised(nearest, held_out).double().mean())


def memorised_features(features: Tensor, train: Tensor, held_out: Tensor) -> float:
    """`memorised` by distances of features: of samples [B, F], of training and of held-out images [R, F]."""
    return memorised(nearest_distance(features, train), nearest_distance(held_out, train))


def memorised_without(nearest: Tensor, held_out: Tensor, groups: Tensor) -> list[float]:
    """`memorised` without each group of samples."""
    return _means_without(_is_memorised(nearest, held_out), groups)


def memorised_features_without(features: Tensor, train: Tensor, held_out: Tensor, groups: Tensor) -> list[float]:
    """`memorised_features` without each group of samples."""
    return memorised_without(nearest_distance(features, train), nearest_distance(held_out, train), groups)


def _is_memorised(nearest: Tensor, held_out: Tensor) -> Tensor:
    """[B]: whether below the quantile of the held-out ones, which itself is one of their distances."""
    place = int(MEMORISED * len(held_out))
    return nearest < held_out.sort().values[place]


def at_most(count: int, rows: Tensor) -> Tensor:
    """Rows [B, ...], or so many of them, spread evenly."""
    return rows if len(rows) <= count else rows[spread(len(rows), count)]


def _radii(points: Tensor, k: int, rows: int) -> Tensor:
    """Distance of each point to its k-th neighbour, [R]; of fewer points, to the last. The nearest is itself."""
    radii = torch.empty(len(points), dtype=torch.float64, device=points.device)  # kept apart, see `_distances`
    for own, part in zip(radii.split(rows), _distances(points, points, rows), strict=True):
        own.copy_(part.kthvalue(min(k + 1, len(points)), dim=1).values)
    return radii


def _distances(points: Tensor, others: Tensor, rows: int) -> Iterator[Tensor]:
    """Of so many points at a time to all others, [rows, O], in float64.

    What is made of each belongs in one tensor that was there before: small ones among large ones pin memory.
    """
    for part in points.split(rows):
        blocks = (torch.cdist(part.double(), block.double()) for block in others.split(_BLOCK))
        yield torch.cat(list(blocks), dim=1)


def _balls_around(features: Tensor, reference: Tensor, k: int, rows: int = _ROWS) -> Tensor:
    """In how many references' balls each sample lies, [B]."""
    features, reference = at_most(NEIGHBOURS, features), at_most(NEIGHBOURS, reference)
    radii = _radii(reference, k, rows)
    counts = torch.empty(len(features), dtype=torch.long, device=features.device)
    for own, distances in zip(counts.split(rows), _distances(features, reference, rows), strict=True):
        own.copy_((distances <= radii).sum(dim=1))
    return counts


def _means_without(values: Tensor, groups: Tensor) -> list[float]:
    """Means of values [B] without each group."""
    count = int(groups.max()) + 1
    sums = torch.zeros(count).double().index_add_(0, groups, values.double())
    sizes = torch.bincount(groups, minlength=count)
    means: list[float] = ((sums.sum() - sums) / (len(values) - sizes)).tolist()
    return means


def _coverage_of_halves(features: Tensor, reference: Tensor, halves: Tensor) -> Tensor:
    radii = _radii(reference, 2 * 5, _ROWS)  # half as many samples are as near to it as all are to its 5th neighbour
    return _gaps_of_halves(features, reference, halves, lambda place, rows: radii[rows].unsqueeze(1))


def _recall_of_halves(features: Tensor, reference: Tensor, halves: Tensor) -> Tensor:
    radii = _radii_in_halves(features, halves, 3)
    return _gaps_of_halves(features, reference, halves, lambda place, rows: radii[place])


def _gaps_of_halves(
    features: Tensor, reference: Tensor, halves: Tensor, radius: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """How many more of the references are near one half than near the other, as a share, [19].

    Args:
        radius: within which a sample is near, of a pair of halves and numbers of references: [R, B], or one of them 1.
    """
    gaps = torch.zeros(len(halves)).double()
    for parity in (0, 1):
        numbers = torch.arange(parity, len(reference), 2)
        for rows, distances in zip(numbers.split(_ROWS), _distances(reference[numbers], features, _ROWS), strict=True):
            for place in range(parity, len(halves), 2):
                near, half = distances <= radius(place, rows), halves[place]
                gap = near[:, half].any(dim=1).sum() - near[:, ~half].any(dim=1).sum()
                gaps[place] += gap / len(numbers)
    return gaps


def _radii_in_halves(points: Tensor, halves: Tensor, k: int, most: int = 64) -> Tensor:
    """`_radii` of each point within its own half of each two, [19, B].

    Looked for among so many of all points: that less than 4 of the nearest 64 are of its half has a chance of 1e-15.
    """
    radii = torch.empty(halves.shape, dtype=torch.float64)
    places = torch.arange(len(points)).split(_ROWS)
    for rows, distances in zip(places, _distances(points, points, _ROWS), strict=True):
        nearest, which = distances.topk(min(most, len(points)), largest=False)
        is_closer = (halves[:, which] == halves[:, rows].unsqueeze(2)).cumsum(dim=2) <= k
        place = is_closer.sum(dim=2).clamp(max=nearest.shape[1] - 1)
        radii[:, rows] = nearest.gather(1, place.T).T
    return radii
