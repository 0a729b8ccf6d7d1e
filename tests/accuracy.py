"""How near results are to those that they are compared with."""

from torch import Tensor


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, as a share of that of `theirs`; in float64, so that it adds no error of its own."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
