"""How stages become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagepatch.core import UserError

# The options that each method takes; the first is the one that it cannot do without.
_OPTIONS = {"sum": (), "ties": ("ties_keep",), "dare": ("dare_drop",), "dare_ties": ("dare_drop", "ties_keep")}
_OPTIONS |= {"fisher": ()}


@dataclass(frozen=True)
class MergeMethod:
    """A method of merging, and its choices.

    Args:
        name: 'sum', of weighted task vectors; 'ties' (arXiv 2306.01708); 'dare' (arXiv 2311.03099), a sum of what was
            dropped and rescaled; 'dare_ties', signs elected among that; or 'fisher' (arXiv 2111.09832), a mean of the
            stages themselves. Empty for 'ties' where ties_keep is given, and else 'sum'.
        ties_keep: share of each tensor's task vector that is kept, the largest. 'dare_ties' can do without, as peft
            does; its authors' code trims what is left after dropping.
        dare_drop: share of each task vector that is set to zero at random; the rest is divided by 1 − dare_drop.
        normalize: of 'fisher': weigh the stages' Fishers alike, whatever their norms; see `Fishers`.
        seed: of what is dropped.

    Raises:
        UserError: options that do not go together.
    """

    name: str = ""
    ties_keep: float = 0.0
    dare_drop: float = 0.0
    normalize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _OPTIONS:
            raise UserError(f"merge_method='{self.name}' is none of {', '.join(_OPTIONS)}.")
        if not 0.0 <= self.ties_keep <= 1.0:
            raise UserError(f"ties_keep={self.ties_keep} must be a share from 0 to 1.")
        if not 0.0 <= self.dare_drop < 1.0:
            raise UserError(
                f"dare_drop={self.dare_drop} must be a share from 0 to below 1: dropping all leaves nothing."
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be 0 or more.")
        own = _OPTIONS[self.kind]
        for option in ("ties_keep", "dare_drop"):
            if getattr(self, option) and option not in own:
                takers = " or ".join(name for name, options in _OPTIONS.items() if option in options)
                raise UserError(
                    f"{option} is an option of merge_method {takers}, not of '{self.kind}': leave one out."
                )
        if own and not getattr(self, own[0]):
            raise UserError(f"merge_method='{self.kind}' needs {own[0]}, a share above 0.")

    @property
    def kind(self) -> str:
        """The name, where it was left open too."""
        return self.name or ("ties" if self.ties_keep else "sum")


SUM = MergeMethod()


def check_weights(stages: Sequence[Path], weights: Sequence[float], method: MergeMethod = SUM) -> None:
    """Refuse weights that stages cannot have.

    Raises:
        UserError: other than one a stage; or for 'fisher', which is a mean, a negative one, or zeros alone.
    """
    if len(stages) != len(weights) or not stages:
        raise UserError(f"{len(weights)} weights for {len(stages)} stages: give one weight for each.")
    if method.kind == "fisher" and (min(weights) < 0.0 or sum(weights) <= 0.0):
        raise UserError(
            f"weights={list(weights)} are shares of a mean: none may be negative, and one must be above 0."
        )
