"""The run log: the seed and one scalar per step, from which the trained weights can be rebuilt.

    with trajectory.record(optimizer, "run.mezo"):     # appends a record at every step
        ...
    trajectory.replay("run.mezo", base_model)          # gives the trained weights, to the bit

docs/trajectory.md is the specification.
"""

from mezo.trajectory.files import begun, compact, read
from mezo.trajectory.fingerprints import fingerprint
from mezo.trajectory.format import Log, Step
from mezo.trajectory.merge import merge
from mezo.trajectory.replay import replay
from mezo.trajectory.replay_files import replay_checkpoint
from mezo.trajectory.resume import catch_up, forgotten, resumable
from mezo.trajectory.writer import Writer, record

__all__ = ["Log", "Step", "Writer", "catch_up", "compact", "fingerprint", "merge", "read", "record"]
__all__ += ["begun", "forgotten", "replay", "replay_checkpoint", "resumable"]
