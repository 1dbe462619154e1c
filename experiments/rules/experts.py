"""Seeds as experts (RandOpt; Gan and Isola, 2026, arXiv:2603.12228): the best K of N vote.

    optimizer = MeZO(model.named_parameters(), lr=0, eps=sigma, estimator=scored, num_samples=N)
    with trajectory.record(optimizer, "run.mezo"):
        optimizer.step(closure)                    # one pass for each direction
    chosen = best(trajectory.read("run.mezo").steps[0].record, K)
    votes = vote(model, chosen, lambda: predictions, seed=..., sigma=...)

Nothing is trained: the rate is 0, and the log holds the N losses.
"""

from collections.abc import Callable, Sequence

import torch

from mezo import noise
from mezo.estimators import Estimate, Estimator
from mezo.forms.direction import Part, Row
from mezo.forms.scratch import Scratch
from mezo.record import Record


def score(closure, direction) -> Estimate:
    """Record L(theta + eps z) in the place of a projected gradient."""
    with direction.at(+1):
        loss = closure()
    return Estimate(loss, loss, (loss,))


scored = Estimator(score, sides=1)


def best(record: Record, k: int) -> list[int]:
    """Return the numbers of the k directions of lowest loss, the best first."""
    losses = record.projected_grads
    return sorted(range(len(losses)), key=lambda i: losses[i])[:k]


@torch.no_grad()
def vote(
    model: torch.nn.Module,
    chosen: Sequence[int],
    predict: Callable[[], torch.Tensor],
    *,
    seed: int,
    sigma: float,
) -> torch.Tensor:
    """Return the class that most experts predict; `predict` returns classes (examples,)."""
    rows = [Row(n, p, noise.tensor_key(seed, n)) for n, p in model.named_parameters()]
    settings, votes = {"eps": sigma, "step": 0, "distribution": "gaussian"}, []
    for probe in chosen:
        with Scratch([Part({}, rows)], settings, probe).at(+1):
            votes.append(predict())
    return torch.stack(votes).mode(0).values
