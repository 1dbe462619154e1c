"""The course of every run: load the model, test it, train it, test it again, and write the result.

    result = carry_out(kind, plan)

Runs on tasks, on text and on rewards are three kinds of run. In a run of several processes only the
first one writes.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from mezo import noise, trajectory
from mezo.errors import InputError
from mezo.memory.measured import PeakOfStretches, give_back
from mezo.models import adapters
from mezo.models import loading as models
from mezo.models.frozen import FrozenLower
from mezo.models.trainable import select, told
from mezo.runs.plan import Plan
from mezo.runs.result import environment, make_folder, write_result
from mezo.trainers import placement
from mezo.trainers.progress import ProgressLines
from mezo.trainers.trainer import MeZOMixin


class Kind(Protocol):
    """The parts in which one kind of run differs from the others."""

    def settled(self, plan: Plan, model: Any, tokenizer: Any) -> Plan:
        """Return the plan completed with values that depend on the loaded model, such as a rate."""

    def trainer(self, plan: Plan, model: Any, tokenizer: Any) -> Any:
        """Return the Trainer. Raises InputError if the model or the data do not fit."""

    def before(self, plan: Plan, trainer: Any) -> dict[str, Any]:
        """Return the result's fields about the model before training."""

    def after(self, plan: Plan, trainer: Any, found: dict[str, Any]) -> dict[str, Any]:
        """Return the result's fields about the tuned model; `found` holds the earlier fields."""


def carry_out(kind: Kind, plan: Plan) -> dict[str, Any]:
    """Carry out the run and return its result, which the first process also writes.

    The output folder then holds run.mezo (the run log), result.json, the Trainer's checkpoints, the
    tuned model and its tokenizer.
    """
    make_folder(plan.args.output_dir)
    model, tokenizer = placement.load(plan.begins, plan.args)
    models.refuse_quantised(model)
    plan.args.dataloader_pin_memory &= torch.accelerator.is_available()  # else it warns
    with trained_part(model, plan):
        settled = kind.settled(plan, model, tokenizer)
        if plan.chosen and settled is plan:
            plan.tell(plan.chosen)
        plan, progress = settled, settled.progress
        trainer = kind.trainer(plan, model, tokenizer)
        if plan.args.disable_tqdm:  # no bars: lines
            trainer.add_callback(ProgressLines(trainer, progress))
        if logs := isinstance(trainer, MeZOMixin):
            trainer.run_config = (trainer.run_config or {}) | plan.config
        with trainer.offloaded() if logs else nullcontext():
            found = kind.before(plan, trainer)
            found |= _train(plan, trainer)
            found |= kind.after(plan, trainer, found)
            if plan.args.offload_write_every:
                trainer.save_model(plan.args.output_dir)
    if plan.writes:
        tokenizer.save_pretrained(plan.args.output_dir)
    found["stored_bytes"] = _stored(plan)
    return finish(plan, found, trainer.run_config)


def finish(
    plan: Plan, found: dict[str, Any], config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the result of a run with the fields that all results have, and write result.json."""
    result = {"model": plan.model.model_name_or_path} | found
    result["method"] = found.get("method", plan.method) + adapters.method_of(plan.model)
    result |= {"seconds": time.perf_counter() - plan.began, "config": config or plan.config}
    result["environment"] = environment()
    return write_result(plan.args.output_dir, result) if plan.writes else result


def trained_part(model: Any, plan: Plan) -> AbstractContextManager:
    """Freeze the weights that are not trained, and tell the user how many are.

    Within the returned context, frozen lower layers run only once per text.
    """
    args = plan.model
    if args.trainable is not None:
        select(model, args.trainable)
        plan.tell(told(model, args.trainable))
    return FrozenLower(model, args.freeze_layers) if args.freeze_layers else nullcontext()


def _train(plan: Plan, trainer: Any) -> dict[str, Any]:
    """Train, and return the result's fields that were measured during training."""
    if plan.args.disable_tqdm:  # no bar that stands at its beginning
        plan.tell("training; the first step prepares what the others need, and takes longer")
    if logs := plan.method == "mezo":
        warm_up(plan.args.distribution)
    trainer.add_callback(memory := _Memory())
    output = trainer.train(resume_from_checkpoint=plan.checkpoint)
    trainer.remove_callback(memory)
    if trainer.state.global_step == 0:
        raise InputError(
            "no step was made: there are fewer training examples than a batch has "
            "(dataloader_drop_last), or num_train_epochs is 0"
        )
    memory.peak.end()
    return {
        "steps": trainer.state.global_step,
        "seconds_of_training": output.metrics["train_runtime"],  # with evaluations and checkpoints
        "train_loss": _mean_loss(plan) if plan.checkpoint and logs else output.training_loss,
        "peak_memory_above_model": max(0, memory.peak.whole),
        "peak_memory_of_steps": max(0, memory.peak.bytes),
    }


class _Memory(TrainerCallback):
    """Measures memory above the model's, for training steps alone and for all of training."""

    def __init__(self) -> None:
        self.peak = PeakOfStretches()

    def on_step_begin(self, args, state, control, **kwargs):
        self.peak.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.peak.end()

    def on_evaluate(self, args, state, control, **kwargs):
        give_back()  # a CPU process would keep the evaluation's memory


def _mean_loss(plan: Plan) -> float | None:
    """Return the mean loss of a resumed run from its log: the Trainer knows only the last part."""
    log = Path(plan.args.output_dir, "run.mezo")
    losses = [step.record.loss for step in trajectory.read(log).steps] if log.exists() else []
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


def warm_up(distribution: str) -> None:
    """Compile the kernels that draw directions; later they would count as a step's memory."""
    if distribution not in noise.DISTRIBUTIONS:
        return  # the optimizer raises the error
    move = noise.Move(0, 0, 1.0, 1.0)
    noise.apply_(torch.zeros(2**18), (0, 0), [move], distribution=distribution)


def _stored(plan: Plan) -> int:
    """Return the bytes that must be kept besides the base model: the run log or the weights."""
    folder = Path(plan.args.output_dir)
    kept = [folder / "run.mezo"] if plan.method == "mezo" else folder.glob("*.safetensors")
    return sum(path.stat().st_size for path in kept if path.exists())
