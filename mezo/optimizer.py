"""torch.optim.Optimizer around Algorithm 1: its options, what a run remembers, and its parts.

Two parts can be replaced: `processes` decides who estimates which direction (one process, or as
many as distributed.join finds), and `weights` knows where tensors lie (here, sharded, offloaded).
"""

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import distributed as dist

from mezo import estimators, guards, noise, rules
from mezo.closures import Closure, Loss
from mezo.errors import InputError
from mezo.estimators import FAILED, Combined, Estimate, Estimator, combined
from mezo.forms import rounding
from mezo.forms.direction import Direction
from mezo.forms.first_look import look_once
from mezo.forms.plan import Trained, planned
from mezo.forms.updates import Update
from mezo.forms.weights import Weights
from mezo.interrupts import held
from mezo.layers import check_layers
from mezo.noise.sharded import is_sharded
from mezo.options import table
from mezo.record import Memory, Record
from mezo.rules import Rule
from mezo.watch import Watch

_OPTIONS = itemgetter(*[option.name for option in table.ARGUMENTS])
_PLANNED = ("seed", "perturbation", "rank", "interval", "distribution", "rounding", "layers")
Joined = tuple[dict[int, list[Estimate]], tuple[int, ...]]  # estimates by probe; walks a probe


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """What `MeZO` is beside Algorithm 1. `forms` and `estimators` are those that it knows by name.

    Attributes:
        processes, weights: The parts that may be replaced.
        observers: Functions that are given every step's Record, also of refused steps.
        guards: Functions that are called before a step; an error in them changes nothing.
        directions: The directions of the step that is being made, by probe.
        together: The probes that share the next closure; one pass may serve them all.
        memory: What the run remembers from step to step.
    """

    forms: ClassVar[Mapping[str, type[Direction]]]
    estimators: ClassVar[Mapping[str, Estimator]]
    _known: Any = None  # how parameters and settings were when the plan was made
    _options: Any = None  # the groups' options when they were last checked

    def __init__(
        self,
        params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rule: str | Rule | dict[str, Any] = "sgd",
        estimator: str | Estimator | Callable[[Any, Any], Estimate] = "two_point",
        shaping: str | None = None,
        num_samples: int = 1,
        seed: int | None = None,
        distribution: str | noise.Distribution = "gaussian",
        perturbation: str | None = None,
        rank: int = 1,
        interval: int = 50,
        rounding: str = "stochastic",
        layers: Mapping[str, Any] | None = None,
        clip: float | None = None,
        clip_quantile: float | None = None,
        max_refused: int = 10,
        common_random_numbers: bool = False,
    ):
        """
        Args:
            params: `model.named_parameters()`, or groups of them: z is keyed by name, so that
                order, filters and wrappers change nothing. `parameters()` works too, keyed by
                position.
            lr: The learning rate, about 100 times smaller than Adam's: 1e-7 to 1e-6 for a large
                model (Tables 15, 16).
            eps: Size of the perturbation: 1e-3 in the paper; 1e-2 for LoRA, 1e-1 for prefixes.
            weight_decay: Each step makes theta (1 - lr * weight_decay) theta before its update.
            rule: A value of rules.py or of your own (docs/extending.md), or one of the names
                "sgd", "momentum", "adam", "sign", "scalar_adam".
            estimator: "two_point", "one_sided" or "one_point" (estimators.py), or a function
                `(closure, direction) -> Estimate` of your own.
            shaping: How the losses of several directions are shaped (estimators.py).
            num_samples: n of n-SPSA (Algorithm 2): the estimates of n directions are averaged.
            seed: Seed of all directions, in [0, 2^64). None takes `torch.initial_seed()`, which
                `torch.manual_seed` sets; torch's generators are neither used nor changed.
            distribution: "gaussian", "rademacher" (signs: the same variance, and cheaper) or
                "gaussian16" (nearly normal numbers of 16 bits; docs/noise.md).
            perturbation: "in_place", "scratch", which leaves the weights alone and is the default
                for 16-bit weights, or "low_rank": z of a matrix is a product (see write).
            rank, interval: Columns of a low-rank direction; steps until its matrix is written.
            rounding: "stochastic", "compensated", "master" or "nearest", for 16-bit weights.
            layers: Scales of tensors (Definitions 6 and 7) or a mask (layers.py).
            clip, clip_quantile: Bounds on |projected_grad|: a value, a quantile of the last 100.
            max_refused: The run ends when this many losses in a row are not finite.
            common_random_numbers: Whether all passes of a batch draw alike (closures.Draws).
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        given["distribution"] = getattr(distribution, "name", distribution)
        given["seed"] = torch.initial_seed() if seed is None else seed
        self.rules = rules.known([type(rule)] if isinstance(rule, Rule) else [])
        given["rule"] = rules.options(rule, self.rules)
        self.measures: dict[str, Estimator] = dict(self.estimators)  # by name: estimators it knows
        given["estimator"] = self._named(estimator)
        self.observers: list[Callable[[Record], None]] = []
        self.guards: list[Callable[[], None]] = []
        self.directions: dict[int, Direction] = {}
        self.together: Sequence[int] = ()
        self.memory, self.watch, self._thread = Memory(), Watch(), threading.Lock()
        self.processes: Any = OneProcess()
        self.weights: Any = Weights()
        super().__init__(params, table.defaults() | given | {"step": 0})
        self._look_at_options()

    def _named(self, estimator: Any) -> str:
        """An estimator's name; one of the user's is kept under it."""
        if not callable(estimator):
            return estimator  # a name, which check_group looks at
        name = estimators.name_of(estimator)
        whole = estimator if isinstance(estimator, Estimator) else Estimator(estimator)
        self.measures.setdefault(name, whole)
        return name

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: the run without its observers, which belong to one run."""
        if type(self.processes) is not OneProcess or type(self.weights) is not Weights:
            raise InputError("an optimizer of several processes, or with offload, is not copied")
        if self.directions:
            raise InputError("an optimizer is not copied between estimate() and step()")
        kept = {name: getattr(self, name) for name in ("rules", "measures", "memory", "watch")}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = None
        if "observers" not in vars(self):  # a copy; torch's load_state_dict calls this, too
            self.observers, self.guards, self.directions, self.together = [], [], {}, ()
            self.processes, self.weights = OneProcess(), Weights()
            self._thread = threading.Lock()

    def add_param_group(self, param_group: dict) -> None:
        guards.warn_of_unknown(param_group)
        super().add_param_group(param_group)
        rule = rules.rule_of(self.settings["rule"], self.rules)
        guards.check_group_(param_group, self.settings, rule, self.measures)
        self._known = None
        self.trained()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with what the run remembers in the first parameter group."""
        found = super().state_dict()
        found["param_groups"][0] |= self.memory.as_dict()
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        guards.check_state(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        rounding.keep_dtypes(self, state_dict)
        for group in self.param_groups:
            table.complete_(group)
        self.memory, self._known = Memory.taken_from(self.param_groups[0]), None

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are one for all parameter groups, as the first group has them."""
        return self.param_groups[0]

    @property
    def rounding(self) -> str:
        return self.settings["rounding"]

    @property
    def rule(self) -> Rule:
        self.trained()
        return self.plan.rule

    @property
    def estimator(self) -> Estimator:
        self.trained()
        return self.plan.estimator

    @property
    def form(self) -> type[Direction]:
        """How theta + eps z reaches the forward pass: scratch for 16 bits, if it was not said."""
        self.trained()
        return self.plan.form

    @property
    def perturbation(self) -> str:
        """The name of the form in use: "in_place", "scratch" or "low_rank"."""
        return next(name for name, form in self.forms.items() if form is self.form)

    def trained(self) -> list[Trained]:
        """(canonical name, parameter, its group) of what has requires_grad, in order.

        Parameters without names are numbered. The list of a step is that of its beginning.
        """
        if not self.directions:
            first = self.param_groups[0]
            known = [first[option] for option in _PLANNED]
            known += [first["estimator"], {**first["rule"]}]
            try:
                for x in itertools.chain(*[group["params"] for group in self.param_groups]):
                    shape = x.requires_grad and (x.dtype, x.numel(), x.is_contiguous())
                    known.append((id(x), shape))
            except (RuntimeError, ValueError):  # of a sparse or lazy one, which the check names
                known.append(None)
            if known != self._known:
                guards.check_tensors(self.param_groups)
                plan = planned(self)
                guards.check_names(plan.trained)
                guards.check_storage(plan.trained)
                self.plan, self._known = plan, known
        return self.plan.trained

    def direction(self, probe: int, closure: Loss | None = None) -> Direction:
        """Direction number `probe` of the step that is being made, for estimates of the closure."""
        if not self.directions:
            if not self.trained():
                raise InputError("no parameter has requires_grad: there is nothing to train")
            for guard in self.guards:
                guard()
        self.processes.begin(self, probe)
        if probe not in self.directions:
            here = self.weights.here
            made = self.plan.new(probe) if here else self.weights.direction(self, probe)
            if here:
                made.bundles, made.together = self.plan.bundles, self.together
            self.directions[probe] = made
        watch, step = self.watch, self.param_groups[0]["step"]
        if (watch.looks or step == watch.again) and closure is not None:  # before anything moves
            look_once(self, closure, self.directions[probe])
        return self.directions[probe]

    def loss(self, closure: Closure | Loss) -> Loss:
        """The closure as estimators call it."""
        if [*map(_OPTIONS, self.param_groups)] != self._options:
            self._look_at_options()
        same = self.param_groups[0]["common_random_numbers"]
        return closure if isinstance(closure, Loss) else Loss(closure, self.processes.around, same)

    def _look_at_options(self) -> None:
        """A schedule, or the user, has changed options: they are checked before anything moves."""
        guards.check_changed_(self.param_groups, self._options, self.rules, self.measures)
        check_layers(self.settings["layers"], self.form, {name for name, _, _ in self.trained()})
        self._options = [*map(_OPTIONS, self.param_groups)]

    def is_idle(self) -> bool:
        """Whether a `step()` without closure asks for nothing: zero gradients at a rate of 0.

        torch.distributed.checkpoint calls it so, to make the state of any optimizer.
        """
        grads = [p.grad for _, p, _ in self.trained() if p.grad is not None]
        still = all(float(group["lr"]) == 0 for group in self.param_groups)
        return still and bool(grads) and not any(bool(g.any()) for g in grads)

    def refuse(self, direction: Direction) -> None:
        """An estimate has raised: theta is restored, and the step counts as taken, unapplied."""
        with held():  # as it is already, unless a second Ctrl-C came at a bad moment
            direction.add(FAILED)
            self.finish(self.combined(told=False))

    def combined(self, told: bool = True) -> Combined:
        """What the step applies, of all its estimates and all processes'."""
        if not self.directions:
            if self.is_idle():
                return Combined({}, 0.0, False)
            raise RuntimeError("step() needs a closure, or estimate(closure) before it")
        if [*map(_OPTIONS, self.param_groups)] != self._options:  # since the estimate
            self._look_at_options()
        seen, cycles = self.processes.joined(self)
        plan, watch = self.plan, self.watch
        found = combined(seen, self.param_groups[0], self.memory, plan.rule, plan.estimator)
        if told and (watch.looking or not found.finite):
            watch.step(found, self)
        return replace(found, cycles=cycles)

    def finish(self, found: Combined) -> float:
        """Apply what was combined, and record it. Returns its loss.

        InputError after max_refused updates in a row that were refused.
        """
        if not found.grads:  # `is_idle`
            return found.loss
        memory, settings, made = self.memory, self.param_groups[0], None
        step, rule = settings["step"], self.plan.rule
        if found.finite:
            past = [*memory.past, (step, tuple(found.grads.values()))]
            memory.past = past if rule.window == "all" else past[-int(rule.window or 1) :]
            memory.number += 1
            made = Update(rule, step, 0.0, 0.0, memory.past, len(memory.past), memory.number)
        self._update(made)
        torch.clear_autocast_cache()
        self.directions, self.together = {}, ()  # the step is made
        for group in self.param_groups:
            group["step"] = step + 1
        if self.plan.form.factored:
            self.weights.end_step_(self)
        record = Record(step, tuple(found.grads.values()), found.loss, found.cycles)
        for observer in self.observers:
            observer(record)
        if not found.finite:
            self.watch.stop(settings)
        return found.loss

    def _update(self, made: Update | None) -> None:
        raise NotImplementedError

    def restore_(self) -> None:
        """Theta is what it was before the directions of this step."""
        self._update(None)

    def write(self) -> None:
        """Bring the weights up to date, to be read or saved.

        Low-rank directions and offload keep updates elsewhere for a while. In place, estimates that
        no step has used are given up: their walks have rounded the weights, and the log says so.
        """
        with held():
            self.give_up()
            self.weights.write_(self)

    def give_up(self) -> None:
        """If estimates have moved the weights and no step has used them, that step is refused."""
        if self.directions and self.form.moves_weights:
            with held():
                for direction in self.directions.values():
                    direction.estimates.clear()
                    direction.add(FAILED)
                self.finish(self.combined(told=False))


class OneProcess:
    """One process: a step's estimates are its own."""

    latest: Mapping[int, list[Estimate]] = MappingProxyType({})  # of the last step, by probe
    around: Callable[[Closure], Closure] | None = None  # what a closure is wrapped in
    _begun = False

    def share(self, num_samples: int) -> range:
        """The directions of a step that this process estimates."""
        return range(num_samples)

    def begin(self, optimizer: ZerothOrderOptimizer, probe: int) -> None:
        """Called before an estimate along direction `probe`."""
        seen = optimizer.directions
        if not max(seen, default=0) <= probe <= len(seen):  # a replay counts on it
            raise ValueError(f"the probes of a step are estimated in order from 0: not {probe} now")
        if self._begun:
            return
        for name, p, _ in optimizer.trained():
            if is_sharded(p):
                raise InputError(
                    f"parameter {name} is sharded: call mezo.distributed.join(optimizer, model)"
                )
        if number_of_processes() > 1:
            logging.getLogger("mezo").warning(
                "%d processes, and no mezo.distributed.join(optimizer, model): each trains weights "
                "of its own",
                number_of_processes(),
            )
        self._begun = True

    def joined(self, optimizer: ZerothOrderOptimizer) -> Joined:
        """The step's estimates, of all processes; called once before the update."""
        seen = optimizer.directions
        self.latest = {i: direction.estimates for i, direction in seen.items()}
        return dict(self.latest), tuple([direction.cycles for direction in seen.values()])


def number_of_processes() -> int:
    """How many there are; 0 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
