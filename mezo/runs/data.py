"""The task of a run, and its training, dev and test examples."""

from mezo import tasks
from mezo.errors import InputError
from mezo.runs.data_arguments import DataArguments
from mezo.tasks import Example, Task

Splits = dict[str, list[Example]]


def task_of(args: DataArguments) -> Task:
    """Return the named task, or a custom one from the options prompt, candidates and labels.

    Raises InputError if the options do not define a task.
    """
    custom = args.task == "custom" or args.prompt is not None or bool(args.candidates)
    if not custom:
        return tasks.get(args.task)
    if args.prompt is None:
        raise InputError("a custom task needs --prompt, a template such as '{text} It was'")
    if args.task not in ("custom", DataArguments.task):
        raise InputError(f"--prompt and --candidates are for --task custom, not {args.task}")
    return tasks.custom_task(
        args.prompt,
        args.candidates,
        labels=args.labels or None,
        label_column=args.label_column,
    )


def load_splits(task: Task, args: DataArguments) -> Splits:
    """Return the train, dev and test examples that the options ask for.

    If no dev examples are given, they are split off the training set as in the paper, and the
    public dev set is the test set. Raises InputError if there are too few examples.
    """
    train = read_split(task, args, "train")
    if args.k is not None:
        number = len(train)
        train, dev = tasks.few_shot(train, args.k, args.split_seed)
        if not dev:
            raise InputError(f"k {args.k} is too many: {number} training examples leave no dev set")
    elif _has_dev(task, args):
        dev = read_split(task, args, "dev")
    else:
        fits = 2 * task.num_dev <= len(train)
        size = args.num_dev or (task.num_dev if fits else len(train) // 5)
        if size == 0:
            raise InputError(f"{len(train)} training examples are too few to train and to validate")
        train, dev = tasks.train_dev(train, args.num_train, size, args.split_seed)
    has_test = args.test_file or args.data_dir or not args.train_file
    if task.paths and not (args.test_file or args.data_dir):
        has_test = bool(task.paths.keys() & {"test", "dev"})
    test = read_split(task, args, "test") if has_test else dev
    return {
        "train": _at_most(train, args.num_train, args.split_seed),
        "dev": _at_most(dev, args.num_dev, args.split_seed),
        "test": tested(test, args),
    }


def _has_dev(task: Task, args: DataArguments) -> bool:
    """Return whether there is a dev set other than the test set."""
    if args.dev_file or args.train_file:
        return bool(args.dev_file)
    if task.paths and not args.data_dir:
        return task.paths.get("dev") not in (None, task.paths.get("test"))
    return tasks.has_own_dev(task, args.data_dir) if args.data_dir else bool(task.folder)


def tested(examples: list[Example], args: DataArguments) -> list[Example]:
    """Return the test examples that the options ask for; all few-shot runs share the same ones."""
    if args.k is not None:
        return tasks.few_shot_test(examples, args.num_test or 1000)
    return _at_most(examples, args.num_test, args.split_seed)


def read_split(task: Task, args: DataArguments, split: str) -> list[Example]:
    file = getattr(args, f"{split}_file")
    return tasks.load_examples(task, split, data_dir=args.data_dir, files=file)


def _at_most(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return tasks.sample(examples, limit, seed)
