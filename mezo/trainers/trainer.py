"""MeZO under transformers' Trainer, and under every trainer built on it (TRL's SFT, DPO, reward).

    from mezo import MeZOConfig, MeZOTrainer
    MeZOTrainer(model, MeZOConfig("out", max_steps=20_000), train_dataset=train).train()

    class MeZOSFTTrainer(MeZOMixin, SFTTrainer): ...

The loop, schedules, evaluation, callbacks, checkpoints and loggers are those of the Trainer.
Instead of a backward pass per micro-batch, an update walks to theta + eps z, to theta - eps z and
back to theta, and evaluates all micro-batches at both ends.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import PushToHubMixin

from mezo import layer_norms
from mezo.closures import Both, Paired, Stacking, copies
from mezo.compatibility import loss_is_scaled
from mezo.distributed.sharding import reshard
from mezo.estimators import merged
from mezo.forms.graphs import Graphs
from mezo.guards import check_loaded
from mezo.mezo import Estimate, MeZO
from mezo.models.modes import evaluating
from mezo.trainers import changes, checkpoints, model_card, placement, refusals
from mezo.trainers.config import MeZOConfig, mezo_options, scale_rates_, schedule_of
from mezo.trainers.history import Window
from mezo.trainers.resume import Tail
from mezo.trainers.run_log import RunLog

_Host: Any = object  # for the type checker: a Trainer class comes after the mixin in the bases


class MeZOMixin(checkpoints.TiedWeights, _Host):
    """Puts MeZO into a Trainer class: `class MeZODPOTrainer(MeZOMixin, DPOTrainer): ...`.

    All parameters with requires_grad=True are trained. Both passes run in eval mode, because the
    noise of dropout would exceed their difference. In a trainer of TRL, the `training` flag of the
    transformers or peft model itself stays True, since TRL uses it to tell training from
    evaluation. `compute_loss` is called twice per micro-batch and direction, without gradients; it
    may return any scalar. The logs contain `projected_grad`, whose absolute value is `grad_norm`,
    and `output_dir/run.mezo` is the run's log (see mezo/trajectory).

    Raises InputError for settings that cannot work: fp16=True (use bf16=True), DeepSpeed, `fsdp=`,
    context parallelism, DataParallel or another optimizer. Do not use it for trainers that generate
    in `_prepare_inputs` (GRPO, RLOO); use MeZOPolicyTrainer for their reward functions.
    """

    optimizer: Any  # MeZO; while training, in Accelerate's wrapper
    run_config: dict[str, Any] | None = None  # for the run log; None: the changed arguments
    pair_loss: Any = None  # (model, inputs, both) -> a micro-batch's losses: closures.Paired.halves
    ref_model: Any = None  # TRL's, beside the model
    _placement: placement.Placement

    def __init__(self, *args, **kwargs):
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, torch.nn.Module):  # before the Trainer moves it
            check_loaded(model.named_parameters())
        refusals.check_kind(type(self))
        super().__init__(*args, **kwargs)
        refusals.check(self)
        placement.check(self)
        self._window: list[tuple[dict, Any, int]] = []  # micro-batches of the next update
        self._estimates: list[Estimate] = []  # of the latest update, one per direction
        self._watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # by _keep_eval
        self._tail = Tail(self)
        self._run_log = RunLog(self)
        self.add_callback(self._run_log)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; with `offload` it must not move the model to the device."""
        super().create_accelerator_and_postprocess()
        self._placement = placement.Placement(self)
        self.accelerator.device_placement &= not self._placement.offloads

    def offloaded(self) -> AbstractContextManager[None]:
        """Return a context in which, with args.offload, `self.model` computes on the device.

        Training, evaluation and prediction enter it themselves. Enter it around several of them to
        set it up once, and around the model's own calls, such as `generate`. Without args.offload
        it does nothing.
        """
        return self._placement.open()

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as the Trainer does; True resumes from the last checkpoint *and* the run log.

        Without a checkpoint, the run is resumed from the given model and the log (see resume.py).
        """
        with self.offloaded(), self._replayed():
            try:
                if resume_from_checkpoint is True:
                    resume_from_checkpoint = self._tail.begin()
                elif resume_from_checkpoint:
                    self._tail.check(resume_from_checkpoint)
                if resume_from_checkpoint and (ended := self._tail.ended(resume_from_checkpoint)):
                    return ended
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                self._note_weights()
                return output
            finally:  # whatever ended it: the log is complete up to the last step
                self._window = []
                self._write()
                self._tail.end()
                self._run_log.close()

    def _replayed(self) -> AbstractContextManager[Any]:
        """Return a context in which the model's forward passes are CUDA graphs, where possible."""
        wanted = getattr(self.args, "graphs", True) and self.args.device.type == "cuda"
        return Graphs().around(self.model) if wanted else nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint = self._tail.checkpoint_of(resume_from_checkpoint)
        if checkpoint is not None:
            self._placement.flush()
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load the states, and then restore the options that may change (changes.py)."""
        given = changes.settings_of(self.optimizer)
        super()._load_optimizer_and_scheduler(self._tail.checkpoint_of(checkpoint))
        if self._tail.checkpoint_of(checkpoint) is not None:
            changes.reinstate_(self.optimizer, self.lr_scheduler, given)

    def take_up(self, optimizer: MeZO, loader: Any = None) -> None:
        """Begin training once everything is loaded: replay the steps that the checkpoint lacks."""
        self._placement.take(optimizer)
        self._tail.catch_up(loader)

    def _save_checkpoint(self, *args, **kwargs):
        with checkpoints.saving(self.args.output_dir, self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)
            self._note_weights()

    def _note_weights(self) -> None:
        """Have the run log note what the weights are now, for replays to compare."""
        self._write()
        self._run_log.digest()

    def _write(self) -> None:
        """Bring the weights up to date, for low-rank directions and offload."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MeZO):
            optimizer.write()

    def evaluation_loop(self, *args, **kwargs):
        self._before_evaluation()
        with self._placement.reading():
            return super().evaluation_loop(*args, **kwargs)

    def _before_evaluation(self) -> None:
        """Bring the weights up to date, if evaluations read them in this process."""
        self._write()

    def save_model(self, *args, **kwargs):
        self._placement.check_saved()
        self._write()
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """As the Trainer's; the card names MeZO, and how run.mezo rebuilds the weights."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model_card.complete(Path(self.args.output_dir, "README.md"), self)

    def _load_best_model(self):
        self._note_weights()  # also, what is summed up would be added to what is loaded
        super()._load_best_model()
        self._run_log.allow_writes()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create MeZO with the Trainer's groups; z does not depend on the weight-decay grouping."""
        if self.optimizer is None:
            model, args = self.model if model is None else model, self.args
            reshard(model)  # after an evaluation
            decayed = set(self.get_decay_parameter_names(model))
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [pair for pair in named if pair[0] in decayed]},
                {"params": [pair for pair in named if pair[0] not in decayed], "weight_decay": 0.0},
            ]
            still: list[int] = []
            if _makes_groups(type(self)):
                groups = self._groups_of_the_host(model, named)
                still = refusals.freeze_still_(groups)
            options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            if isinstance(args, MeZOConfig):
                scales = self._scales(model, named) if args.modified else {}
                options |= mezo_options(args, model, named, scales)
            self.optimizer = MeZO([g for g in groups if g["params"]], seed=args.seed, **options)
            self.optimizer.guards.append(partial(refusals.check_still, self.optimizer, still))
        return self.optimizer

    def _scales(self, model: Any, named: list[tuple[str, Any]]) -> dict[str, float]:
        """Return d of Definitions 6 and 7 by tensor: the resumed run's, or the model's norms."""
        if had := self._tail.scales():
            return had
        if self.args.modified_norms == "parameters":
            return layer_norms.parameter_norms(named)
        loss = partial(self._loss_of_first, model)
        eps, seed = self.args.mezo_eps, self.args.seed
        with evaluating(model):
            return layer_norms.gradient_norms(named, loss, eps=eps, seed=seed)

    def _loss_of_first(self, model: Any) -> float:
        """Return the loss of a batch of training examples that are spread over the data set."""
        rows, size = self.train_dataset, self.args.per_device_train_batch_size
        spread = range(0, len(rows), max(1, len(rows) // size))[:size]
        batch = self.data_collator([rows[i] for i in spread])
        with self.compute_loss_context_manager():
            return float(self.compute_loss(model, self._prepare_inputs(batch)))

    def _groups_of_the_host(self, model: Any, named: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Return the parameter groups of a subclass's create_optimizer, with their own rates."""
        theirs = super().create_optimizer(model)
        self.optimizer, names = None, {id(p): name for name, p in named}
        groups = []
        for group in theirs.param_groups:
            pairs = [(names[id(p)], p) for p in group["params"] if id(p) in names]
            groups.append({"params": pairs, "lr": group["lr"]})
            groups[-1]["weight_decay"] = group.get("weight_decay", 0.0)
        return [group for group in groups if group["params"]]

    def _wrap_model(self, model, training=True, dataloader=None):
        """Autocast and compile without DDP, whose gradient buckets are as large as the weights."""
        model = super()._wrap_model(model, training=False, dataloader=dataloader)
        return self.accelerator.prepare_model(model, evaluation_mode=True) if training else model

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Keep the micro-batch; with the update's last one, estimate along every direction.

        Returns the update's loss, the mean of both passes, with the last micro-batch, and 0 with
        the others.
        """
        scaled = loss_is_scaled(self, num_items_in_batch)
        divisor = 1 if scaled else self.current_gradient_accumulation_steps
        self._window.append((inputs, num_items_in_batch, divisor))
        if not self.accelerator.sync_gradients:  # more micro-batches to come
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        model.eval()
        if _is_trl(type(self)):  # it tells training from evaluation by the model's own flag
            self.model.training = isinstance(self.model, PushToHubMixin)
            self._keep_eval(self.model)
        optimizer = self.optimizer.optimizer
        fresh = getattr(self.args, "fresh_batches", False)
        if (schedule := schedule_of(self.args, optimizer, self.state.max_steps)) is not None:
            schedule.step()
        if getattr(self.args, "scale_lr_with_samples", False):
            scale_rates_(optimizer, self.lr_scheduler)
        self._estimates = []
        own = optimizer.processes.share(optimizer.param_groups[0]["num_samples"])
        optimizer.together = () if fresh else own
        whole = optimizer.loss(self._closure(model, window))  # one, so that L(theta) is shared
        for probe, part in zip(own, _parts(window, len(own), fresh), strict=False):
            loss = optimizer.loss(self._closure(model, part)) if fresh else whole
            found = optimizer.estimate(loss, probe)  # theta is restored: callbacks may save
            self._estimates.append(found)
        loss = sum(estimate.loss for estimate in self._estimates) / len(self._estimates)
        return torch.tensor(loss, device=self.args.device)

    def _keep_eval(self, model: torch.nn.Module) -> None:
        """Set the model's own flag to evaluation within every forward pass, by hooks.

        Some classes read `self.training` in their outermost module, for dropout for example.
        """
        if model in self._watched:
            return
        self._watched.add(model)
        before: list[bool] = []

        def enter(module, *given):
            before.append(module.training)
            module.training = False

        def leave(module, *given):
            module.training = before.pop()

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave, always_call=True)

    def _closure(self, model, window) -> Callable[[], float | torch.Tensor]:
        alone = partial(self._window_loss, model, window)
        if self.pair_loss is None:
            return alone
        each = [self.stacking(model, inputs) for inputs, *_ in window]
        pair = partial(self._window_pair, model, window)
        return Paired(alone, pair, *reduce(Stacking.and_of, each))

    def stacking(self, model, inputs) -> Stacking:
        """Return what `pair_loss` takes in one pass over copies of the inputs."""
        return Stacking()

    def _window_pair(self, model, window, both: Both) -> list[float]:
        """Return the losses of an update, with each micro-batch and its copies in one pass."""
        losses = [0.0] * copies(both)
        for inputs, _, divisor in window:
            with self.compute_loss_context_manager():
                pair = self.pair_loss(model, self._prepare_inputs(inputs), both)
            losses = [loss + float(x) / divisor for loss, x in zip(losses, pair, strict=True)]
        return losses

    def _window_loss(self, model, window) -> float:
        """Return the loss over this process's micro-batches of an update."""
        loss = 0.0
        for inputs, num_items, divisor in window:
            # pass a new dict each time, as compute_loss changes it
            fresh = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                micro = self.compute_loss(model, fresh, num_items_in_batch=num_items)
            loss += float(micro) / divisor
        return loss

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        """Return the length of the update in units of lr |z|; for one direction, |projected_grad|.

        The Trainer's `grad_norm` is 0, since there are no gradients to clip. `log` replaces the
        value by that of all processes.
        """
        return _norm([estimate.projected_grad for estimate in self._estimates])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._estimates:
            latest = self.optimizer.optimizer.processes.latest.values()
            grads = [merged(estimates).projected_grad for estimates in latest]
            logs["projected_grad"] = sum(grads) / len(grads)
            if "grad_norm" in logs:
                logs["grad_norm"] = _norm(grads)
            window, self._tail.window = self._tail.window, Window()
            if window.steps:  # a resumed run's first: the mean of what was replayed, too
                logs["loss"] = window.mean(logs["loss"], self.state.global_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count 2 per weight, token and pass; the Trainer counts 6, including a backward pass."""
        tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        mezo = self.optimizer.optimizer
        passes = mezo.estimator.passes(mezo.settings["num_samples"])
        return super().floating_point_ops(tensors) * passes // 3


class MeZOTrainer(MeZOMixin, Trainer):
    """transformers' Trainer with MeZO: the same arguments and loop, with forward passes alone."""


def _is_trl(kind: type) -> bool:
    return any(base.__module__.startswith("trl.") for base in kind.__mro__)


def _makes_groups(kind: type) -> bool:
    """Return whether a class behind the mixin overrides create_optimizer."""
    behind = kind.__mro__[kind.__mro__.index(MeZOMixin) + 1 :]
    hosts = [base for base in behind if base is not Trainer and issubclass(base, Trainer)]
    own = [base for base in hosts if "create_optimizer" in vars(base)]
    return any(not base.__module__.startswith("trl.") for base in own)


def _norm(grads: list[float]) -> float:
    return math.hypot(*grads) / len(grads)


def _parts(window: list[tuple], n: int, fresh: bool) -> list[list[tuple]]:
    """The micro-batches of n directions: all of them, or a share each, whose loss is a mean."""
    if not fresh:
        return [window] * n
    shares = [window[i::n] for i in range(min(n, len(window)))]
    return [[(x, c, d * len(part) / len(window)) for x, c, d in part] for part in shares]
