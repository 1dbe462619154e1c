"""A learning curve, point by point."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One evaluation during training."""

    step: int
    forward_passes: int  # of one batch each; a backward pass counts as two
    seconds: float  # time of training, without evaluations
    accuracy: float
    loss: float
