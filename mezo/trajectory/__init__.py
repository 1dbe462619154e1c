"""The run log: a run is its seed and one scalar a step, and the file that holds them is the model.

    with trajectory.record(optimizer, "run.mezo"):     # a record is appended at every step
        ...
    trajectory.replay("run.mezo", base_model)          # the trained weights, to the bit

docs/trajectory.md is the specification.
"""

from .format import Log, Step, read
from .replay import replay
from .resume import catch_up, resumable
from .writer import Writer, fingerprint, record

__all__ = ["Log", "Step", "Writer", "catch_up", "fingerprint", "read", "record", "replay"]
__all__ += ["resumable"]
