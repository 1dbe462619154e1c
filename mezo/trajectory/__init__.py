"""The run log: a run is its seed and one scalar a step, and the file that holds them is the model.

    with trajectory.record(optimizer, "run.mezo"):     # a record is appended at every step
        ...
    trajectory.replay("run.mezo", base_model)          # the trained weights, to the bit

docs/trajectory.md is the specification.
"""

from .format import Log, Step, read
from .replay import replay
from .writer import Writer, fingerprint, record

__all__ = ["Log", "Step", "Writer", "fingerprint", "read", "record", "replay"]
