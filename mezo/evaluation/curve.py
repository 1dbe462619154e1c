"""A learning curve, point by point."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One evaluation along the way."""

    step: int
    forward_passes: int  # of one batch; a backward pass counts as two
    seconds: float  # of training, evaluations left out
    accuracy: float
    loss: float
