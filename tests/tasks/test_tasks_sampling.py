"""Samples against the reference's, of which some published numbers are known."""

import numpy as np
import pytest

from mezo import tasks
from mezo.errors import InputError
from mezo.tasks import (
    Example,
    demonstration_sets,
    few_shot,
    few_shot_test,
    sample,
    train_dev,
)


def test_the_test_examples_of_few_shot_runs_are_the_references():
    """SNLI's test.tsv in the reference's folders begins with rows 7988, 7120, 106 of 9,842."""
    assert sample(range(9_842), 3, tasks.TEST_SEED) == [7988, 7120, 106]
    assert few_shot_test(range(9_842))[:3] == [7988, 7120, 106]
    assert len(few_shot_test(range(1001))) == 1000
    assert few_shot_test(range(1000)) == list(range(1000))


def test_train_and_dev_are_the_two_ends_of_one_sample():
    """The reference: sample_subset(num_train + num_dev), of which the last num_dev are for dev."""
    rows = range(100)
    train, dev = train_dev(rows, 30, 20, 7)
    assert train + dev == sample(rows, 50, 7)
    assert len(dev) == 20
    train, dev = train_dev(rows, None, 20, 7)
    assert train + dev == sample(rows, 100, 7)
    train, dev = train_dev(rows, 1000, 90, 7)  # as WSC's 554: dev as asked, train what is left
    assert (len(train), len(dev)) == (10, 90)
    for size in (0, 100, 101):
        with pytest.raises(InputError, match=f"got {size} of 100"):
            train_dev(rows, 1000, size, 7)


def test_demonstrations_of_each_test_example_are_its_own():
    """The reference: seeds are drawn with seed 0, and a set is sample_subset of its seed."""
    rows = range(50)
    sets = list(demonstration_sets(rows, 4, 3))
    seeds = np.random.RandomState(0).randint(0, 10_000, 3)
    assert sets == [np.random.RandomState(seed).permutation(50)[:4].tolist() for seed in seeds]
    assert sets[0] != sets[1]


def test_a_label_is_short_of_examples_below_twice_k_and_the_log_says_so(caplog):
    """k to train on and k for validation; with just as many nothing is said."""

    def rows(zeros, ones):
        return [Example({}, 0)] * zeros + [Example({}, 1)] * ones

    few_shot(rows(8, 8), 4, 0)
    assert not caplog.records
    few_shot(rows(8, 7), 4, 0)
    (record,) = caplog.records
    assert record.getMessage() == "label 1 has 7 examples, 8 were asked for"


def test_seeds_are_those_of_numpy_s_generator():
    """32 bits: the largest is taken, one more and one less than the least are refused by name."""
    assert len(sample([1, 2, 3], 2, 2**32 - 1)) == len(sample([1, 2, 3], 2, 0)) == 2
    for seed in (2**32, -1):
        with pytest.raises(InputError, match=r"must be in \[0, 2\^32\), got"):
            sample([1, 2, 3], 2, seed)
