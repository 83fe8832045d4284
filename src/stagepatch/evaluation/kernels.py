"""Metrics of kernels and of spectra: KID, CMMD, Vendi score, Inception score. Kernels are summed block by block."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.evaluation.neighbours import NEIGHBOURS, at_most
from stagepatch.evaluation.statistics import check_dimensions

_ROWS = 2048
Kernel = Callable[[Tensor, Tensor], Tensor]


def kid(features: Tensor, reference: Tensor, subsets: int = 50) -> float:
    """Kernel distance (arXiv 1801.01401): unbiased, cubic kernel, mean over random subsets, always the same.

    The subsets are those of torchmetrics' KernelInceptionDistance with seed 0.
    """
    check_dimensions(features.shape[1], reference.shape[1])
    size = min(len(features), len(reference), 500)
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(subsets):
        real, fake = (of[torch.randperm(len(of), generator=generator)[:size]] for of in (reference, features))
        real, fake = real.double(), fake.double()
        within = sum(_off_diagonal(_cubic(of, of)).sum() for of in (real, fake)) / (size * (size - 1))
        values.append(within - 2 * _cubic(real, fake).sum() / size**2)
    return float(torch.stack(values).mean())


def kid_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """KID of all pairs, no subsets, without each group of samples, less the term of the reference alone.

    A random subset would change with what it is drawn from, and its chance hide what a group makes. Of more than
    NEIGHBOURS samples or references so many stand for all, which makes an interval wider, not narrower.
    """
    return _discrepancy_without(features, reference, groups, _cubic, is_unbiased=True)


def cmmd(features: Tensor, reference: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Maximum mean discrepancy of CLIP's embeddings (arXiv 2401.09603): squared, Gaussian kernel, times 1,000.

    Embeddings [B, F] are divided by their length first. As in the authors' code, pairs of an image with itself are
    in the means, so of equally distributed sets it is a little above 0, by about scale·(1/B + 1/R)·(1 − mean kernel).
    """
    check_dimensions(features.shape[1], reference.shape[1])
    kernel, (x, y) = _gaussian(sigma), (features, reference)
    within = sum(_kernel_sum(of, of, kernel) / len(of) ** 2 for of in (x, y))
    return scale * (within - 2 * _kernel_sum(x, y, kernel) / (len(x) * len(y)))


def cmmd_without(features: Tensor, reference: Tensor, groups: Tensor) -> list[float]:
    """`cmmd` without each group of samples, less the term of the reference alone; see `kid_without`."""
    without = _discrepancy_without(features, reference, groups, _gaussian(10.0), is_unbiased=False)
    return [1000.0 * value for value in without]


def vendi(features: Tensor) -> float:
    """Vendi score (arXiv 2210.02410) of features [B, F]: how many different images there are, in effect.

    exp of the entropy of the eigenvalues of K/B, K the cosine similarity of each with each; those other than zero are
    the ones of the [F, F] matrix XᵀX/B, so K is never made. It cannot exceed F, and grows with B up to it.
    """
    return _effective_rank(_gram(features) / len(features))


def vendi_without(features: Tensor, groups: Tensor) -> list[float]:
    """`vendi` without each group of samples."""
    whole, sizes = _gram(features), torch.bincount(groups)
    parts = (_gram(features[groups == group]) for group in range(len(sizes)))
    rests = zip(parts, (len(features) - sizes).tolist(), strict=True)
    return [_effective_rank((whole - part) / rest) for part, rest in rests]


def _gram(features: Tensor) -> Tensor:
    gram = torch.zeros(features.shape[1], features.shape[1]).double()
    for part in features.split(_ROWS):
        x = F.normalize(part.double())
        gram += x.mT @ x
    return gram


def _effective_rank(matrix: Tensor) -> float:
    return float(torch.special.entr(torch.linalg.eigvalsh(matrix).clamp(min=0.0)).sum().exp())


def inception_score(logits: Tensor) -> float:
    """exp of the mean divergence of p(class | image) from p(class) (arXiv 1606.03498), of logits [B, C], in one part.

    With ten parts, as often, it is lower: each has a tenth of the images. It cannot exceed C.
    """
    log_p = logits.double().log_softmax(dim=1)
    log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(logits))).log()
    return float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())


def clip_score(features: Tensor, captions: Tensor) -> float:
    """Mean cosine of images' [B, F] and their captions' [B, F] CLIP embeddings, times 100, those below 0 as 0.

    CLIPScore (arXiv 2104.08718) without its weight of 2.5, as it is reported on MS-COCO: one caption an image.
    """
    return float(_cosines(features, captions).mean())


def clip_score_without(features: Tensor, captions: Tensor, groups: Tensor) -> list[float]:
    """`clip_score` without each group of samples."""
    cosines = _cosines(features, captions)
    return [float(cosines[groups != group].mean()) for group in range(int(groups.max()) + 1)]


def _cosines(features: Tensor, captions: Tensor) -> Tensor:
    return 100.0 * F.cosine_similarity(features, captions).double().clamp(min=0.0)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[1] + 1.0) ** 3


def _gaussian(sigma: float) -> Kernel:
    """Of embeddings divided by their length: then |x − y|² = 2 − 2xy."""
    return lambda x, y: torch.exp((F.normalize(x) @ F.normalize(y).mT - 1.0) / sigma**2)


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel - kernel.diag().diag()


def _kernel_sum(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    return sum(float(kernel(a.double(), b.double()).sum()) for a in x.split(_ROWS) for b in y.split(_ROWS))


def _discrepancy_without(
    features: Tensor, reference: Tensor, groups: Tensor, kernel: Kernel, is_unbiased: bool
) -> list[float]:
    """Mean kernel of samples less twice that of samples and references, without each group, [G].

    Args:
        is_unbiased: leave out pairs of a sample with itself.
    """
    features, groups, reference = (at_most(NEIGHBOURS, rows) for rows in (features, groups, reference))
    members = F.one_hot(groups).double()
    size, count = members.sum(dim=0), members.shape[1]
    pairs, (cross, itself) = torch.zeros(count, count).double(), torch.zeros(2, count).double()
    blocks = [*zip(features.split(_ROWS), members.split(_ROWS), strict=True)]
    for place, (a, own) in enumerate(blocks):
        x = a.double()
        for other_place, (b, other) in enumerate(blocks):
            values = kernel(x, b.double())
            pairs += own.mT @ values @ other
            if is_unbiased and place == other_place:
                itself += own.mT @ values.diagonal()
        for b in reference.split(_ROWS):
            cross += own.mT @ kernel(x, b.double()).sum(dim=1)
    rest = len(features) - size
    within = pairs.sum() - 2 * pairs.sum(dim=1) + pairs.diagonal() - (itself.sum() - itself)
    within /= rest * (rest - 1) if is_unbiased else rest**2
    values_without: list[float] = (within - 2 * (cross.sum() - cross) / (rest * len(reference))).tolist()
    return values_without
