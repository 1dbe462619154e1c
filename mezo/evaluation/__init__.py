"""Scores, linear probes and learning curves."""
