"""The training options of a run, as dataclasses: MeZOConfig with the command line's defaults.

The model's options are in models/arguments.py and the data's options in mezo/arguments.py.
"""

from dataclasses import dataclass, field

from mezo.trainers.config import MeZOConfig
from mezo.trainers.policy import MeZOPolicyConfig

BEST = "task"  # metric_for_best_model: the task's own


@dataclass
class TrainArguments(MeZOConfig):
    """MeZOConfig with the defaults of the command line: the paper's batch, evaluation by steps."""

    output_dir: str = "runs/mezo"  # type: ignore[assignment]
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Learning rate; by default it is measured on the model, or else chosen by the "
            "model's size and by what is trained."
        },
    )
    mezo_eps: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Size of the perturbation; default 1e-3, for adapters 1e-2, for a prefix 1e-1."
        },
    )
    method: str = field(
        default="mezo",
        metadata={
            "help": "Training method: mezo, or a baseline: adam (backpropagation), lp (linear "
            "probing), zero-shot, icl (in-context learning)."
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "Train on a metric instead of the cross-entropy: accuracy or macro_f1 of a "
            "batch's candidates, or f1 of the answers that the model writes."
        },
    )
    max_steps: int = 20_000  # Table 16
    per_device_train_batch_size: int = 16  # Table 16
    per_device_eval_batch_size: int = 32
    eval_strategy: str = "steps"  # type: ignore[assignment]
    eval_steps: float = 500
    logging_steps: float = 50  # its default, 500, leaves a slow run silent for an hour
    save_strategy: str = "steps"  # type: ignore[assignment]
    save_steps: float = 500
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = field(
        default=BEST,
        metadata={"help": "Metric that selects the checkpoint; default: the task's own metric."},
    )
    report_to: str = "none"  # type: ignore[assignment]


@dataclass
class RewardTrainArguments(TrainArguments, MeZOPolicyConfig):
    """TrainArguments and the options of generation, with defaults for the command line."""

    output_dir: str = "runs/reward"
    remove_unused_columns: bool = False
    max_steps: int = 1000
    eval_steps: float = 100
    save_steps: float = 100
    load_best_model_at_end: bool = False  # the learning curve is noisy, and there is a log
    metric_for_best_model: str | None = "reward"
