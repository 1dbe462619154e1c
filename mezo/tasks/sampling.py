"""Subsets of a data set, as the paper draws them, so that its splits can be had again."""

import logging
from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .task import Example


def sample(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """The first n of a random permutation; all of them, permuted, if n exceeds their number.

    The permutation is numpy's legacy one, as in the paper's experiments on OPT. There a training
    and a validation set were the first and the last part of one such sample.
    """
    if n < 1:
        raise InputError(f"the number of examples must be at least 1, got {n}")
    return [examples[i] for i in _generator(seed).permutation(len(examples))[:n]]


def few_shot(train: Sequence[Example], k: int, seed: int) -> tuple[list[Example], list[Example]]:
    """k examples a label for training and the next k of each for validation.

    Equal to the paper's RoBERTa splits (those of LM-BFF, seeds 13, 21, 42, 87, 100), order
    included, if `train` has the order of the original file. A label with fewer than 2k examples
    gives what it has, first to the training set, and is named in the log.
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
