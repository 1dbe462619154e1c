"""Benchmarks: `python -m benchmarks.NAME --output FILE.json`."""
