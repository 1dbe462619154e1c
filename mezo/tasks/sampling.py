"""Subsets of a data set, drawn as the paper draws them, so that its splits can be reproduced."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from mezo.errors import InputError
from mezo.tasks.task import Example

TEST_SEED = 42  # generate_k_shot_data.py: of the 1,000 test examples, whatever the split's seed


def sample(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return the first n of a random permutation; all of them, permuted, if n exceeds their number.

    The permutation is numpy's legacy one, as in the paper's experiments on OPT.
    """
    if n < 1:
        raise InputError(f"the number of examples must be at least 1, got {n}")
    return [examples[i] for i in _generator(seed).permutation(len(examples))[:n]]


def train_dev(
    examples: Sequence[Example], num_train: int | None, num_dev: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw a training and a validation set from one permutation, as the paper's runs on OPT do.

    Of the first num_train + num_dev examples of `sample` the last num_dev are for validation. None
    for num_train takes all examples. If there are fewer examples than were asked for, the training
    set is the smaller one: with 1,000 and 500, WSC's 554 leave 54, as in the reference.
    """
    number = len(examples) if num_train is None else num_train + num_dev
    if not 0 < num_dev < min(number, len(examples)):
        raise InputError(
            f"num_dev must leave examples to train on: got {num_dev} of {len(examples)}"
        )
    mixed = sample(examples, number, seed)
    return mixed[:-num_dev], mixed[-num_dev:]


def demonstration_sets(train: Sequence[Example], k: int, number: int) -> Iterator[list[Example]]:
    """Yield k demonstrations for each of `number` test examples, another set for each.

    They are drawn as in the paper's in-context runs (k = 32): the i-th set is a sample whose seed
    is the i-th of `number` random ones, and the test examples are sample(test, number, 0).
    """
    for seed in _generator(0).randint(0, 10_000, number):
        yield sample(train, k, int(seed))


def few_shot_test(test: Sequence[Example], num_test: int = 1000) -> list[Example]:
    """Return the examples on which few-shot runs are tested, the same ones for all splits.

    Up to 1,000 examples are taken as they are. Of more, a sample is drawn with seed 42, as in the
    reference, whatever the seed of the split.
    """
    return list(test) if len(test) <= num_test else sample(test, num_test, TEST_SEED)


def few_shot(train: Sequence[Example], k: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return k examples per label for training and the next k of each for validation.

    They equal the paper's RoBERTa splits (those of LM-BFF, seeds 13, 21, 42, 87, 100), order
    included, if `train` has the order of the original file. A label with fewer than 2k examples
    gives what it has, first to the training set, and a warning names it.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    order = list(range(len(train)))
    _generator(seed).shuffle(order)
    by_label: dict[int, list[Example]] = {}  # labels in the order of their first example
    for i in order:
        by_label.setdefault(train[i].label, []).append(train[i])
    for label, rows in by_label.items():
        if len(rows) < 2 * k:
            logging.getLogger("mezo").warning(
                "label %d has %d examples, %d were asked for", label, len(rows), 2 * k
            )
    groups = by_label.values()
    return [e for g in groups for e in g[:k]], [e for g in groups for e in g[k : 2 * k]]


def _generator(seed: int) -> np.random.RandomState:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed of a sample must be in [0, 2^32), got {seed}")
    return np.random.RandomState(seed)
