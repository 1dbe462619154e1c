"""MeZO, Algorithm 1 of Malladi et al. (2023), arXiv:2305.17333: tuning by forward passes alone.

    theta <- theta +   eps z ;  loss_plus  = L(theta; batch)        z ~ N(0, I), drawn from a seed
    theta <- theta - 2 eps z ;  loss_minus = L(theta; batch)        wherever it is needed,
    theta <- theta +   eps z                                        never stored
    projected_grad = (loss_plus - loss_minus) / (2 eps)
    theta <- theta - lr * projected_grad * z

projected_grad * z is an unbiased estimate of the gradient of L smoothed at the scale of eps; as
eps -> 0, projected_grad is the derivative of L along z. Memory: the weights and one forward.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mezo.closures import Closure
from mezo.distributed.processes import Alone
from mezo.errors import Held
from mezo.estimators import FAILED, Estimate, applied, one_way, weighed
from mezo.forms.factors import write_due_
from mezo.forms.rounding import keep_dtypes
from mezo.forms.updates import Update
from mezo.guards import check_group, check_storage
from mezo.layers import check_layers
from mezo.perturbation import InPlace, Resident, Scratch, form, trained
from mezo.rules import Record, Rule, options, remember
from mezo.watch import Watch


@torch.no_grad()
def spsa(closure: Closure, perturbed: InPlace | Scratch) -> Estimate:
    """Definition 1: two forward passes. In place, it leaves the weights at theta - eps z."""
    if (both := perturbed.losses(closure)) is not None:  # one pass: low-rank directions, offload
        loss_plus, loss_minus = both
    else:
        with perturbed.at(+1):
            loss_plus = float(closure())  # waits for the device: the only two syncs of a step
        with perturbed.at(-1):
            loss_minus = float(closure())
    projected_grad = (loss_plus - loss_minus) / (2 * perturbed.eps)
    return Estimate(projected_grad, (loss_plus + loss_minus) / 2, (loss_plus, loss_minus))


class MeZO(torch.optim.Optimizer):
    """Fine-tune with forward passes alone: `optimizer.step(lambda: model(**batch).loss)`.

    Args:
        params: `model.named_parameters()`, or groups of them: z is keyed by name, so that order,
            filters and wrappers change nothing. `parameters()` works too, keyed by position.
        lr: about 100 times smaller than Adam's: 1e-7 to 1e-6 for a large model (Tables 15, 16).
        eps: size of the perturbation: 1e-3 in the paper; 1e-2 for LoRA, 1e-1 for prefixes.
        weight_decay: decoupled, theta <- (1 - lr * weight_decay) theta at each step.
        rule: "sgd", or "momentum", "adam", "sign", "scalar_adam", or a value of rules.py.
        estimator, shaping: other differences of losses, and what becomes of several: estimators.py.
        num_samples: n of n-SPSA (Algorithm 2): directions a step, whose estimates are averaged.
        seed: of all directions, in [0, 2^64). None takes `torch.initial_seed()`, that is, what
            `torch.manual_seed` was given; torch's generators are neither used nor changed.
        distribution: of z: "gaussian", or "rademacher" (signs; the same variance, cheaper).
        perturbation: "in_place", "scratch" (weights untouched); None: scratch for 16-bit weights.
            "low_rank": z of a matrix is a product of thin ones. Fastest; see `write`.
        rank, interval: of low_rank: columns of a direction, steps between writings of a matrix.
        rounding: of 16-bit weights' updates: "stochastic", "compensated", "master" or "nearest".
        layers: what is a tensor's own: d of Definitions 6 and 7, a mask (layers.py).
        clip, clip_quantile: bounds on |projected_grad|: a value, a quantile of the last 100.
        max_refused: updates in a row that may be refused for a loss that is not finite.

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
        rule: str | Rule | dict[str, Any] = "sgd",
        estimator: str = "two_point",
        shaping: str | None = None,
        num_samples: int = 1,
        seed: int | None = None,
        distribution: str = "gaussian",
        perturbation: str | None = None,
        rank: int = 1,
        interval: int = 50,
        rounding: str = "stochastic",
        layers: Mapping[str, Any] | None = None,
        clip: float | None = None,
        clip_quantile: float | None = None,
        max_refused: int = 10,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        given |= {"seed": torch.initial_seed() if seed is None else seed, "rule": options(rule)}
        self.observers: list[Callable[[Record], None]] = []  # told of every step, refused ones too
        self._seen: dict[int, InPlace | Scratch] = {}  # by probe: what was estimated for a step()
        self._watch, self.processes = Watch(), Alone()  # distributed.join: as many as there are
        self.weights: Any = Resident()  # or an offload.Offload, while its context lasts
        super().__init__(params, given | {"step": 0})
        check_layers(given["layers"], self.perturbation, {name for name, _, _ in self.trained()})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_group(param_group, self.param_groups[0])
        check_storage([(name, p) for name, p, _ in self.trained()])

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def trained(self) -> list[tuple[str, torch.nn.Parameter, dict]]:
        """(canonical name, parameter, its group) of everything that is perturbed, in order."""
        return trained(self.param_groups)

    @property
    def perturbation(self) -> str:
        """The form in use: "in_place", "scratch" or "low_rank"."""
        return form(self.trained(), self.param_groups[0])

    def estimate(
        self, closure: Closure, probe: int = 0, *, restore: bool = True, clean: float | None = None
    ) -> Estimate:
        """The estimate along direction number `probe` of this step, for a `step()` to follow.

        Calls for one probe share z and are averaged. If one raises, theta is restored, and the step
        counts as taken, without update. restore=False leaves the weights perturbed to `step()`.
        `clean`, for one_sided, is the loss of an estimate made before of this closure's batch.
        """
        forward = self.processes.begin(closure, probe, self._seen, self)
        self._move()
        first = self.param_groups[0]
        if probe not in self._seen:
            self._seen[probe] = self.weights.perturb(self, probe)
        perturbed, before = self._seen[probe], len(self._seen[probe].estimates)
        try:
            two_point = first["estimator"] == "two_point"
            others = (first, probe, clean)
            found = spsa(forward, perturbed) if two_point else one_way(forward, perturbed, *others)
            perturbed.estimates.append(weighed(found, closure))
            self._watch.first(forward, perturbed)
            if restore:
                self._move()
        except BaseException:
            perturbed.estimates[before:] = [FAILED]
            self._update(raised=True)
            raise
        return found

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One update, from `closure` (2 num_samples forward passes) or from the estimates made.

        Returns the mean loss. One not finite refuses the update; InputError after max_refused.
        """
        own, clean = self.processes.own(self.param_groups[0]["num_samples"]), None
        self.weights.together(self, own if closure else ())
        for probe in own if closure else ():  # the last one is restored by the update
            clean = self.estimate(closure, probe, restore=probe < own[-1], clean=clean).loss  # type: ignore
        if not self._seen:
            raise RuntimeError("step() needs a closure, or estimate(closure) before it")
        loss = self._update()
        self._watch.stop(self.param_groups[0])
        return loss

    def write(self) -> None:
        """Low-rank directions, offload: bring the weights up to date, to be read or saved."""
        self.weights.write_(self)

    def _update(self, raised: bool = False) -> float:
        """theta <- theta - lr * (projected_grad z, averaged over the probes); home first."""
        first, (seen, cycles) = self.param_groups[0], self.processes.joined(self._seen, self)
        grads, loss, finite = applied(seen, first)
        if not raised:  # else the exception says it
            self._watch.step(finite, grads, loss, self)
        interrupt, step = Held(), first["step"]
        if finite:
            remember(first, step, grads.values())
        with interrupt:
            self._move(updating=finite)
        self._seen = {}
        for group in self.param_groups:
            group["step"] = step + 1
        with interrupt:
            write_due_(self.trained(), first, self.state)
        for observer in self.observers:
            observer(Record(step, tuple(grads.values()), loss, cycles))
        interrupt.release()
        return loss

    def _move(self, *, updating: bool = False) -> None:
        """Every tensor home, and on by the rule's update, in one pass over each where it can be."""
        first, interrupt = self.param_groups[0], Held()
        updates = {id(g): Update.of(g, first) if updating else None for g in self.param_groups}
        for i, (name, p, group) in enumerate(self.trained()):
            moves = [move for perturbed in self._seen.values() for move in perturbed.way_home(i)]
            with interrupt:  # it arrives when a tensor is done: the others follow first
                self.weights.make_(self, p, name, moves, updates[id(group)])
        torch.clear_autocast_cache()
        interrupt.release()
