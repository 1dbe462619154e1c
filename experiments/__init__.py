"""Experiments: `python -m experiments.NAME` writes experiments/results/NAME.json."""
