"""The run log: a run is its seed and one scalar a step, and the file that holds them is the model.

    with trajectory.record(optimizer, "run.mezo"):     # a record is appended at every step
        ...
    trajectory.replay("run.mezo", base_model)          # the trained weights, to the bit

docs/trajectory.md is the specification.
"""

from mezo.trajectory.files import begun, compact, read
from mezo.trajectory.format import Log, Step
from mezo.trajectory.merge import merge
from mezo.trajectory.replay import replay
from mezo.trajectory.replay_files import replay_checkpoint
from mezo.trajectory.resume import catch_up, forgotten, resumable
from mezo.trajectory.writer import Writer, fingerprint, record

__all__ = ["Log", "Step", "Writer", "catch_up", "compact", "fingerprint", "merge", "read", "record"]
__all__ += ["begun", "forgotten", "replay", "replay_checkpoint", "resumable"]
