"""MeZO, Algorithm 1 of Malladi et al. (2023), arXiv:2305.17333: tuning by forward passes alone.

    theta <- theta +   eps z ;  loss_plus  = L(theta; batch)        z ~ N(0, I), drawn from a seed
    theta <- theta - 2 eps z ;  loss_minus = L(theta; batch)        wherever it is needed,
    theta <- theta +   eps z                                        never stored
    projected_grad = (loss_plus - loss_minus) / (2 eps)
    theta <- theta - lr * projected_grad * z

projected_grad * z is an unbiased estimate of the gradient of L smoothed at the scale of eps; as
eps -> 0, projected_grad is the derivative of L along z. Memory: the weights and one forward.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import noise
from .errors import Held
from .guards import check_group, check_storage

Closure = Callable[[], float | torch.Tensor]  # the loss of one forward pass


@dataclass(frozen=True)
class Estimate:
    """One two-point estimate: the gradient is about `projected_grad` * z."""

    projected_grad: float  # change of the loss a unit of z
    loss: float  # (loss_plus + loss_minus) / 2 = L(theta) + O(eps^2)


@dataclass(frozen=True)
class Record:
    """What one step did to the weights; with the settings in force, all that a replay needs."""

    step: int
    projected_grads: tuple[float, ...]  # one a probe; nothing was applied unless all are finite
    loss: float
    cycles: tuple[int, ...]  # walks a probe: 1, or more where losses were accumulated


class Walk:
    """theta -> theta + eps z -> theta - eps z -> theta, in place, one tensor after the other.

    Every tensor makes the same three moves, whatever is raised in between: a replay repeats them.
    Home again, an element is off by at most 3 roundings.
    """

    PLUS, MINUS, HOME = 1, 2, 3

    def __init__(self, tensors: Sequence[tuple], eps: float, **where: Any):
        self.tensors, self.eps, self.where = tensors, eps, where  # (key, tensor) each; which z
        self.moves = [(1.0, eps), (1.0, -2 * eps), (1.0, eps)]
        self.at = [self.HOME] * len(tensors)  # moves made, tensor by tensor
        self.estimates: list[Estimate] = []

    def to(self, stage: int, then: list[list] | None = None) -> None:
        """Move on to `stage`; in the same pass, theta <- scale theta + c z for the pairs `then`."""
        interrupt = Held()  # it arrives when a tensor is done: the others follow first
        for i, (key, tensor) in enumerate(self.tensors):
            terms = self.moves[self.at[i] : stage] + (then[i] if then else [])
            self.at[i] = stage
            with interrupt:
                noise.apply_(tensor, key, terms, **self.where)
        torch.clear_autocast_cache()  # it would hold casts of the weights as they were
        interrupt.release()


@torch.no_grad()
def spsa(closure: Closure, walk: Walk) -> Estimate:
    """Definition 1: two forward passes. Leaves the weights at theta - eps z."""
    walk.at = [0] * len(walk.tensors)
    walk.to(Walk.PLUS)
    loss_plus = float(closure())  # waits for the device: the only two syncs of a step
    walk.to(Walk.MINUS)
    loss_minus = float(closure())
    return Estimate((loss_plus - loss_minus) / (2 * walk.eps), (loss_plus + loss_minus) / 2)


class MeZO(torch.optim.Optimizer):
    """Fine-tune with forward passes alone: `optimizer.step(lambda: model(**batch).loss)`.

    Args:
        params: `model.named_parameters()`, or groups of them: z is keyed by name, so that order,
            filters and wrappers change nothing. Plain `parameters()` works too, keyed by position.
            What has requires_grad=False stays as it is.
        lr: about 100 times smaller than Adam's: 1e-7 to 1e-6 for a large model (Tables 15, 16).
        eps: size of the perturbation: 1e-3 in the paper; 1e-2 for LoRA, 1e-1 for prefixes.
        weight_decay: decoupled, theta <- (1 - lr * weight_decay) theta at each step.
        num_samples: n of n-SPSA (Algorithm 2): directions a step, whose estimates are averaged.
        seed: of all directions, in [0, 2^64). None takes `torch.initial_seed()`, that is, what
            `torch.manual_seed` was given; torch's generators are neither used nor changed.
        distribution: of z: "gaussian", or "rademacher" (signs; the same variance, cheaper).
        in_place: perturb 16-bit weights too. Refused otherwise: rounding destroys them.

    Call `model.eval()` first: dropout would drown the difference of the passes. Not for training
    from scratch: a good start is what leaves few directions to learn (Section 4).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_samples: int = 1,
        seed: int | None = None,
        distribution: str = "gaussian",
        in_place: bool = False,
    ):
        seed = torch.initial_seed() if seed is None else seed
        defaults: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"num_samples": num_samples, "distribution": distribution, "seed": seed}
        defaults |= {"step": 0, "in_place": in_place}
        self.observers: list[Callable[[Record], None]] = []  # told of every step, refused ones too
        self._walks: dict[int, Walk] = {}  # by probe: what was estimated since the last step
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_group(param_group, self.param_groups[0])
        check_storage([(name, p) for name, p, _ in self.trained()])

    def trained(self) -> list[tuple[str, torch.nn.Parameter, dict]]:
        """(canonical name, parameter, its group) of everything that is perturbed, in order."""
        rows, position = [], 0
        for group in self.param_groups:
            names = group.get("param_names") or map(str, range(position, 2**31))
            position += len(group["params"])
            named = zip(names, group["params"], strict=False)
            rows += [(noise.canonical_name(n), p, group) for n, p in named if p.requires_grad]
        return rows

    def _walk(self, probe: int) -> Walk:
        group = self.param_groups[0]
        where = {"step": group["step"], "probe": probe, "distribution": group["distribution"]}
        keyed = [(noise.tensor_key(group["seed"], name), p) for name, p, _ in self.trained()]
        return Walk(keyed, group["eps"], **where)

    def estimate(self, closure: Closure, probe: int = 0, *, restore: bool = True) -> Estimate:
        """The estimate along direction number `probe` of this step, for a `step()` to follow.

        Calls for one probe share z and are averaged. If one raises, theta is restored, and the step
        counts as taken, without update. restore=False leaves theta - eps z to `step()`.
        """
        if probe < max(self._walks, default=0):  # a replay counts on their order
            raise ValueError(f"the probes of a step are estimated in order: {probe} comes too late")
        walk = self._walks[probe] = self._walks.get(probe) or self._walk(probe)
        before = len(walk.estimates)
        try:
            walk.estimates.append(spsa(closure, walk))
            if restore:
                walk.to(Walk.HOME)
        except BaseException:
            walk.estimates[before:] = [Estimate(math.nan, math.nan)]
            self._update()
            raise
        return walk.estimates[-1]

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One update, from `closure` (2 num_samples forward passes) or from the estimates made.

        Returns the mean loss. One that is not finite refuses the update, but the step is counted.
        """
        n = self.param_groups[0]["num_samples"]
        for probe in range(n) if closure else ():  # the last one is restored by the update
            self.estimate(closure, probe, restore=probe < n - 1)  # type: ignore[arg-type]
        if not self._walks:
            raise RuntimeError("step() needs a closure, or estimate(closure) before it")
        return self._update()

    def _update(self) -> float:
        """theta <- (1 - lr weight_decay) theta - lr / n * sum of projected_grad z, last z first."""
        walks, self._walks = self._walks, {}
        seen = {i: walk.estimates for i, walk in walks.items()}
        grads = {i: sum(e.projected_grad for e in es) / len(es) for i, es in seen.items()}
        loss = sum(sum(e.loss for e in es) / len(es) for es in seen.values()) / len(seen)
        applied = all(map(math.isfinite, grads.values()))
        rates = [(float(group["lr"]), group["weight_decay"]) for _, _, group in self.trained()]
        interrupt = Held()
        for i, walk in reversed(walks.items()):
            update = [[(1 - lr * decay, -lr * grads[i] / len(walks))] for lr, decay in rates]
            with interrupt:
                walk.to(Walk.HOME, then=update if applied else None)  # the way home and the update
            rates = [(lr, 0.0) for lr, _ in rates]  # decay once, whatever the number of probes
        step = self.param_groups[0]["step"]
        if not applied:
            logging.getLogger("mezo").warning("step %d: loss %s: update refused", step, loss)
        for group in self.param_groups:
            group["step"] = step + 1
        for observer in self.observers:
            observer(Record(step, tuple(grads.values()), loss, tuple(map(len, seen.values()))))
        interrupt.release()
        return loss
