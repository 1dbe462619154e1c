"""The health of a run on rewards under the Trainer: rewards/health.py has the rules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mezo.errors import InputError
from mezo.estimators import Estimate
from mezo.forms.updates import Update
from mezo.mezo import sgd
from mezo.rewards.health import Bounds, Health, advantages, share_changed

SCALES = ("none", "group")


class Vitals:
    """Figures of a MeZOPolicyTrainer's run, and its population's rewards, prompt by prompt."""

    def __init__(self, trainer: Any, args: Any, held_out: Sequence[Sequence[int]]):
        if args.scale_rewards not in SCALES:
            raise InputError(f"scale_rewards must be none or group, got {args.scale_rewards!r}")
        self.group = args.scale_rewards == "group"
        if self.group:
            _check_group(args)
        self._trainer = trainer
        self._held_out = [row for row in held_out if len(row) > 1]
        if held_out and not self._held_out:
            raise InputError("held_out has no text of two tokens or more")
        self.health = Health(Bounds(stop_forgotten=args.stop_forgotten))
        self.members: list[list[float | None]] = []  # rewards of each pass of this step

    def scaled(self, estimates: list[Estimate]) -> list[Estimate]:
        """Return the step's estimates, with rewards scaled prompt by prompt if that was asked for.

        The directions of the step take the scaled ones too.
        """
        members, self.members = self.members, []
        if not self.group:
            return estimates
        values = advantages(members)
        found = []
        for i, estimate in enumerate(estimates):
            plus, minus = values[2 * i : 2 * i + 2]
            grad = (minus - plus) / 2  # eps cancels: lr is about the size of a weight's step
            found.append(replace(estimate, projected_grad=grad))
        directions = self._trainer.optimizer.optimizer.directions
        for direction, one in zip(directions.values(), found, strict=True):
            direction.estimates[:] = [one]
        return found

    def begin(self) -> None:
        """Note the loss on texts that are not trained, from which a rise is counted."""
        if "held_out" not in self.health.first:
            self.judge({f"eval_{name}": x for name, x in self.held_out_loss().items()}, 0)

    def held_out_loss(self) -> dict[str, float]:
        """Return the loss a token on the texts that are not trained."""
        if not self._held_out:
            return {}
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer._placement.reading():
            engine = trainer._held.of(model, trainer.processing_class)
            loss = trainer._held.losses_of_texts(engine, self._held_out)
        return {"held_out_loss": loss}

    def share_changed(self) -> dict[str, float]:
        """Return the share of weights that the last update changed.

        Nothing is returned if the update was not made of moves, or was 0.
        """
        optimizer = self._trainer.optimizer.optimizer
        (part, *_), memory = optimizer.plan.parts, optimizer.memory
        moved = memory.past and any(memory.past[-1][1])
        if not moved or not optimizer.rule.linear or optimizer.form.factored:
            return {}
        how = float(part.group["lr"]), part.group["weight_decay"], memory.past, len(memory.past)
        update = Update(optimizer.rule, memory.past[-1][0], *how, memory.number)
        moves = sgd(update, optimizer.rounding)
        found = share_changed(part.rows, moves, optimizer.settings["distribution"])
        return {"weights_changed": found}

    def judge(self, logs: dict[str, float], estimates: int) -> None:
        """Warn by the rules, and end the training if one says so."""
        names = {"ties": "ties", "weights_changed": "changed", "eval_held_out_loss": "held_out"}
        names |= {"completions/repetition": "repetition", "completions/clipped_ratio": "clipped"}
        figures = {names[name]: value for name, value in logs.items() if name in names}
        if self._trainer.optimizer and self._trainer.optimizer.optimizer.watch.tied:
            figures.pop("ties", None)  # the optimizer has said so
        if self.health.judge(figures, estimates):
            self._trainer.control.should_training_stop = True


def _check_group(args: Any) -> None:
    """Raise InputError where there is no group of rewards per prompt."""
    wanted = {
        "num_samples of at least 2": args.num_samples >= 2,
        "estimator two_point": args.estimator == "two_point",
        "no shaping": args.shaping is None,
        "gradient_accumulation_steps 1": args.gradient_accumulation_steps == 1,
        "one process": args.world_size == 1,
    }
    for what, given in wanted.items():
        if not given:
            raise InputError(f"scale_rewards group needs {what}")
