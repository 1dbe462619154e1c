"""Train on reward functions with transformers' Trainer; a script for TRL's GRPO can be used as is.

    trainer = MeZOPolicyTrainer(model, reward_funcs=short, args=MeZOPolicyConfig("out"),
                                train_dataset=prompts, processing_class=tokenizer)

A row has a `prompt`, a text or a conversation; its other columns go to the reward functions. An
update generates one completion per prompt at theta + eps z and one at theta - eps z. It needs no
group of generations, no reference model and no old policy. Every update samples with new noise.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer

from mezo.engines import Engine
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives.generation import Generation, tokens_of
from mezo.rewards import RewardFunc, RewardFunctions, Sampled, Ties
from mezo.rewards.health import repetition
from mezo.rewards.objective import worded
from mezo.trainers.config import MeZOConfig, changed
from mezo.trainers.engines import Held, check_choices, check_engine, started
from mezo.trainers.trainer import MeZOMixin
from mezo.trainers.vitals import Vitals

_EVALUATION = 2**31  # draws from here on belong to evaluations, which all use the same ones


@dataclass
class MeZOPolicyConfig(MeZOConfig):
    """MeZOConfig with the options of generation and rewards, named as in TRL's GRPOConfig."""

    remove_unused_columns: bool = False  # type: ignore[assignment]  # rewards read the columns
    max_completion_length: int = field(
        default=64, metadata={"help": "Longest completion, in tokens."}
    )
    min_completion_length: int = field(
        default=0, metadata={"help": "Number of tokens before which a completion may not end."}
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": "Strings that end a completion and are cut off."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, as in GRPO; 0 is greedy decoding."}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample only from the likeliest tokens with this total probability."},
    )
    top_k: int = field(
        default=0, metadata={"help": "Sample only from this many of the likeliest tokens; 0: all."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; default: 1 each."}
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Append prompts, completions and rewards to completions.jsonl."},
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "With num_samples > 1, group: centre and scale each prompt's rewards over all "
            "directions and both their halves, as GRPO does within a group."
        },
    )
    stop_forgotten: float | None = field(
        default=None,
        metadata={"help": "Stop when the held-out loss has risen by so many nats a token."},
    )
    engine: str = field(
        default="transformers",
        metadata={"help": "What generates: transformers, or vllm (docs/engines.md)."},
    )
    engine_options: str | None = field(
        default=None,
        metadata={"help": "Options of the engine, as JSON: '{\"tensor_parallel_size\": 2}'."},
    )

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the Trainer moves the model to the device: not if an engine has the weights."""
        return super().place_model_on_device if self.engine == "transformers" else False

    def generation(self) -> Generation:
        """Return the options of generation. Raises InputError for a value out of range."""
        return Generation(
            max_new_tokens=self.max_completion_length,
            min_new_tokens=self.min_completion_length,
            stop=tuple(self.stop),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )


class MeZOPolicyTrainer(MeZOMixin, Trainer):
    """Trains a language model by MeZO on the rewards of the text that it generates.

    The logs contain `reward`, `rewards/<function>/mean`, `completions/mean_length`,
    `completions/clipped_ratio` (the fraction without an end within the limit) and `ties`, the
    fraction of estimates whose two rewards were equal, and figures of the run's health
    (rewards/health.py). They cover both halves of all estimates
    since the last log. `evaluate` returns `eval_reward` and so on, and
    `metric_for_best_model="reward"` works. With several processes, each generates for its own
    prompts, and the losses are averaged; evaluations repeat some prompts if they cannot be shared
    evenly.

    Args:
        model: A causal language model, peft's wrapper of one, or a name or folder to load.
        reward_funcs: One or several functions (see rewards.functions); `rewards.Command` for
            programs.
        args: The options, including those of generation; None uses MeZOPolicyConfig's defaults.
        train_dataset, eval_dataset: Rows with `prompt` and the reward functions' columns.
        processing_class: The tokenizer; None loads the model's own.
        peft_config: The config of an adapter to train instead of all weights.
        engine: What holds the weights and generates: "transformers", "vllm", or an Engine whose
            weights are the model's. None: what args.engine names.
        held_out: Texts that are not trained; evaluations report their loss a token as
            `held_out_loss`, which rises as the model forgets.

    Raises InputError as MeZOMixin does, and for a data set without prompts.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunctions | RewardFunc | Sequence[RewardFunc],
        args: MeZOPolicyConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        engine: str | Engine | None = None,
        held_out: Sequence[str] = (),
        **kwargs: Any,
    ):
        args = MeZOPolicyConfig("trainer_output") if args is None else args
        if engine is not None:
            args.engine = engine if isinstance(engine, str) else engine.name
        if not isinstance(engine, Engine):
            check_engine(args.engine, args.engine_options)
        if isinstance(engine, Engine) or args.engine != "transformers":
            check_choices(args)
        if args.remove_unused_columns:
            raise InputError("remove_unused_columns=True would take the prompts: leave it False")
        model, processing_class = _loaded(model, processing_class)
        if peft_config is not None:
            from peft import get_peft_model

            with models.peft_errors("peft_config"):
                model = get_peft_model(model, peft_config)
        if not isinstance(reward_funcs, RewardFunctions):
            reward_funcs = RewardFunctions(reward_funcs, args.reward_weights)
        elif args.reward_weights is not None:
            raise InputError("reward_weights are in the RewardFunctions given: leave them out")
        self.reward_funcs, self.generation = reward_funcs, args.generation()
        self.vitals = Vitals(self, args, tokens_of(processing_class, list(held_out)))
        if not isinstance(engine, Engine):
            engine = started(args.engine, model, args.engine_options)
        self._held = Held(engine)
        self.log_completions = args.log_completions
        self.ties = Ties()
        self.on_sample: Callable[[Sampled], None] | None = None
        self._tally, self._eval_tally = _Tally(), _Tally()
        self._tied: list[bool] = []  # since the last log
        self._tokens = self._micro = self._eval_batch = 0
        args.label_names = []
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=_collate,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = False  # a mean over the micro-batch
        self.run_config = changed(args) | {"reward_funcs": reward_funcs.names}
        self.run_config |= {"generation": asdict(self.generation)}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Do what MeZOMixin does; the first step has no look at the loss, which would generate."""
        optimizer: Any = super().create_optimizer(model)
        optimizer.watch.looks = False
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Do what MeZOMixin does; both halves of a micro-batch's estimates sample with one draw."""
        args, state = self.args, self.state
        self._micro = 0 if not self._window else self._micro + 1
        draw = state.global_step * args.gradient_accumulation_steps + self._micro
        draw = (draw * args.world_size + args.process_index) % _EVALUATION
        loss = super().training_step(model, inputs | {"draw": draw}, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._estimates = self.vitals.scaled(self._estimates)
            for estimate in self._estimates:
                self.ties.add(estimate.projected_grad)
                self._tied.append(estimate.projected_grad == 0)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return minus the mean reward of completions for the rows, with the present weights."""
        sampled = self.sample(inputs["rows"], inputs["draw"], model)
        if inputs["draw"] < _EVALUATION:
            self._tally.add(sampled)
            self.vitals.members.append(sampled.scores.total)
            self._tokens += sum(len(completion.ids) for completion in sampled.completions)
        else:
            self._eval_tally.add(sampled)
        loss = torch.tensor(sampled.loss, dtype=torch.float64, device=self.args.device)
        return (loss, {}) if return_outputs else loss

    def sample(self, rows: Sequence[dict[str, Any]], draw: int, model: Any = None) -> Sampled:
        """Return completions for rows of a data set, and their rewards."""
        prompts, columns = _columns(rows)
        tokenizer: Any = self.processing_class
        tokens = tokens_of(tokenizer, worded(tokenizer, prompts))
        with self._placement.reading():
            model = self.accelerator.unwrap_model(self.model if model is None else model)
            (sampled,) = self._held.of(model, tokenizer).rewards(
                prompts,
                [self._held.here()],
                self.generation,
                self.reward_funcs,
                tokens=tokens,
                columns=columns,
                draw=draw,
                trainer_state=self.state,
            )
        if self.log_completions and self.is_world_process_zero():
            self._append(sampled, draw)
        return sampled

    def _append(self, sampled: Sampled, draw: int) -> None:
        scores, kind = sampled.scores, "train" if draw < _EVALUATION else "eval"
        lines = []
        for i, (prompt, completion) in enumerate(
            zip(sampled.prompts, sampled.completions, strict=True)
        ):
            row = {"step": self.state.global_step, "split": kind, "prompt": prompt}
            row |= {"completion": completion.text, "reward": scores.total[i]}
            row |= {name: values[i] for name, values in scores.per_function.items()}
            row |= {name: v[i] for name, v in scores.extra.items() if len(v) > i}
            lines.append(json.dumps(row, default=str) + "\n")
        path = Path(str(self.args.output_dir), "completions.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        args, self._eval_batch = self.args, self._eval_batch + 1
        draw = _EVALUATION + self._eval_batch * args.world_size + args.process_index
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs | {"draw": draw}), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._eval_tally, self._eval_batch = _Tally(), -1
        output = super().evaluation_loop(
            dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        found = self._eval_tally.averages() | self.vitals.held_out_loss()
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._tally.averages()
            if self._tied:
                logs["ties"] = sum(self._tied) / len(self._tied)
            logs |= self.vitals.share_changed()
            self.vitals.judge(logs, len(self._tied))
            self._tally, self._tied = _Tally(), []
        elif "eval_held_out_loss" in logs:
            self.vitals.judge(logs, 0)
        super().log(logs, start_time)

    def take_up(self, optimizer: Any, loader: Any = None) -> None:
        """Begin as MeZOMixin does; then an engine takes the weights that the run is at."""
        super().take_up(optimizer, loader)
        self._held.take_up(optimizer)
        self.vitals.begin()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._held.give(getattr(self.optimizer, "optimizer", self.optimizer))

    def close_engine(self) -> None:
        """Free the engine; the model then has its weights."""
        self._write()
        self._held.close(getattr(self.optimizer, "optimizer", self.optimizer))

    def _before_evaluation(self) -> None:
        if not self._held.is_remote:  # an engine has the weights that evaluations read
            super()._before_evaluation()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """2 per weight and generated token; reading the prompts is left out."""
        tokens, self._tokens = self._tokens, 0
        model: Any = self.model
        return 2 * tokens * sum(p.numel() for p in model.parameters())


class _Tally:
    """Sums of what is to be logged, over samples, and in the end over processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, sampled: Sampled) -> None:
        scores, completions = sampled.scores, sampled.completions
        self._add("reward", [x for x in scores.total if x is not None])
        for name, rewards in scores.per_function.items():
            self._add(f"rewards/{name}/mean", [x for x in rewards if x is not None])
        self._add("completions/mean_length", [len(c.ids) for c in completions])
        self._add("completions/repetition", [repetition([c.ids]) for c in completions])
        self._add("completions/clipped_ratio", [not c.finished for c in completions])
        self._add("unscored", [x is None for x in scores.total])
        for name, values in scores.metrics.items():
            self._add(name, values)

    def _add(self, name: str, values: Sequence[float]) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + sum(values), count + len(values)

    def averages(self) -> dict[str, float]:
        """Means over all samples of all processes, which call this together."""
        found: dict[str, tuple[float, int]] = {}
        for sums in gather_object([self._sums]):
            for name, (total, count) in sums.items():
                before = found.get(name, (0.0, 0))
                found[name] = before[0] + total, before[1] + count
        means = {name: total / count for name, (total, count) in found.items() if count}
        if not means.get("unscored"):
            means.pop("unscored", None)
        return means


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if "prompt" not in row:
            raise InputError(f"a row has no column 'prompt', it has {', '.join(row)}")
    return {"rows": rows}


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts, and the other columns as TRL passes them: those of the first row."""
    names = [n for n in rows[0] if n not in ("prompt", "completion", "completion_ids")]
    try:
        return [row["prompt"] for row in rows], {n: [row[n] for row in rows] for n in names}
    except KeyError as error:
        raise InputError(f"a row has no column {error}, which others have") from None


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    name = model if isinstance(model, str) else model.config._name_or_path
    if isinstance(model, str):
        model, own = models.load(ModelArguments(name))
        tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            raise InputError("processing_class is missing: give the model's tokenizer") from None
    return model, tokenizer
