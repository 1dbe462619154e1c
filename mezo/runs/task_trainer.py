"""The Trainer of a task: its loss is the form's, and its dev metrics are those of `evaluate`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mezo.errors import InputError
from mezo.evaluation.evaluate import candidate_metrics, chosen
from mezo.objectives import Batch, Feature, Form, Generated
from mezo.runs.arguments import BEST, TrainArguments
from mezo.runs.data import Splits
from mezo.tasks import Example, Task
from mezo.trainers.task import AdamTaskTrainer, MeZOTaskTrainer

PLACE = "dev_place"  # key, in features and batches, of an example's index in the dev examples
ANSWERS = "answers"  # the same of the right answers of a training example that is to be written


def task_trainer(model: Any, form: Form, splits: Splits, args: TrainArguments) -> Any:
    """Return the Trainer that trains on splits["train"] and validates on splits["dev"].

    It keeps the best weights by args.metric_for_best_model, by default the task's metric as
    `evaluate` computes it. A task that generates text is validated by its loss, since generating at
    every evaluation would take longer than training.
    """
    args.remove_unused_columns, args.label_names = False, ["labels"]
    train = [form.encode(example) for example in splits["train"]]
    dev = [form.encode(example) for example in splits["dev"]]
    metrics: Any = None
    if isinstance(form, Generated):
        pairs = zip(train, splits["train"], strict=True)
        train = [feature | {ANSWERS: example.answers} for feature, example in pairs]
        args.metric_for_best_model, args.greater_is_better = "loss", False
    else:
        dev = [feature | {PLACE: place} for place, feature in enumerate(dev)]
        args.label_names.append(PLACE)
        metrics = partial(_metrics, form.task, splits["dev"])
        _choose_metric(args, form.task)
    kind: Any = MeZOTaskTrainer if args.method == "mezo" else AdamTaskTrainer
    try:
        return kind(
            model,
            args,
            form=form,
            train_dataset=train,
            eval_dataset=dev,
            data_collator=partial(_collate, form),
            compute_metrics=metrics,
        )
    except (ValueError, RuntimeError) as error:  # of an argument: report_to, seed, ...
        raise InputError(str(error)) from error


def _choose_metric(args: TrainArguments, task: Task) -> None:
    known = {"accuracy": True, task.metric: True, "loss": False}
    if task.metric in ("f1", "exact_match"):
        known |= {"f1": True, "exact_match": True}
    asked = (args.metric_for_best_model or BEST).removeprefix("eval_")
    asked = task.metric if asked == BEST else asked
    if asked not in known:
        raise InputError(
            f"metric_for_best_model {asked!r} is not one of {', '.join(known)}, which task "
            f"{task.name} has"
        )
    args.metric_for_best_model, args.greater_is_better = asked, known[asked]


def _collate(form: Form, features: Sequence[Feature]) -> Batch:
    """Return the form's batch, and what is not the form's.

    Dev examples, which may come in any order, have their indices. Training examples of a task that
    generates have the prompts and answers that `--objective f1` needs.
    """
    batch: dict[str, Any] = form.collate(features)
    if PLACE in features[0]:
        batch[PLACE] = torch.tensor([feature[PLACE] for feature in features])
    if ANSWERS in features[0]:
        batch["prompts"] = [feature["prompt"] for feature in features]
        batch[ANSWERS] = [list(feature[ANSWERS]) for feature in features]
    return batch


def _metrics(task: Task, dev: Sequence[Example], prediction) -> dict[str, float]:
    """Return the metrics of `evaluate` from the scores that the Trainer gathered."""
    _, places = prediction.label_ids
    examples = [dev[place] for place in places]
    scores = torch.from_numpy(prediction.predictions)
    for row, example in zip(scores, examples, strict=True):
        own = len(task.candidates_of(example)) or len(task.labels)
        row[own:] = -torch.inf  # the Trainer pads with -100
    return candidate_metrics(task, chosen(scores), examples)
