"""Replay onto a checkpoint's files, tensor by tensor: any model in the memory of one tensor.

    trajectory.replay_checkpoint("run.mezo", "opt-66b/", "tuned/")

The files that come out have the names, keys and order of those that went in. A parameter that is
not one tensor of the files (experts that loading merges, a new head) cannot be rebuilt so.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo.errors import InputError
from mezo.models.safetensors_files import Checkpoint, Place, write
from mezo.rules import Rule, known
from mezo.trajectory.files import read
from mezo.trajectory.format import Step
from mezo.trajectory.program import make_, program_of
from mezo.trajectory.replay import FROZEN_DIFFER, match, steps_until
from mezo.trajectory.stored_parameters import Layout, layout_of
from mezo.trajectory.writer import fingerprint

Progress = Callable[[int, int], None]


def replay_checkpoint(
    log: str | Path,
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    until: int | None = None,
    verify: bool = True,
    rules: Sequence[type[Rule]] = (),
    progress: Progress | None = None,
) -> int:
    """Write the tuned checkpoint of a run from its base checkpoint, without loading the model.

        trajectory.replay_checkpoint("run.mezo", "llama-3-70b/", "tuned/")

    Bitwise what `replay` of the loaded model gives. Memory: the largest tensor and, for 16-bit
    weights, the buffer of their rounding. What was not trained is copied, config and tokenizer too.
    If the run loaded the model in another dtype, the result has that dtype. Nothing in `output_dir`
    looks finished before all is.

    Args:
        source_dir: a local folder with model.safetensors, or with shards and their index.
        output_dir: another folder; files of the same names in it are replaced.
        until: stop at that step of the run.
        verify: first read everything once and compare fingerprints with the log's.
        rules: classes of your own that the run was made with.
        progress: `progress(done, total)` is told of each trained tensor.

    Returns the number of steps. Raises InputError if the log is an adapter's or starts from another
    base, or if a trained parameter is not a tensor of the files: `replay` the loaded model then.
    """
    found, output = read(log), Path(output_dir)
    steps, checkpoint = steps_until(log, found, until), Checkpoint(Path(source_dir))
    if output.resolve() == checkpoint.folder.resolve():
        raise InputError(f"output_dir {output} is the base model's own folder")
    plan = _Plan(log, found.header, checkpoint, known(rules))
    if verify:
        plan.verify()
    write(checkpoint, output, plan.replaying(steps, progress), plan.dtypes())
    return len(steps)


class _Plan:
    """What becomes of each tensor of a checkpoint. Raises InputError if the log is not for it."""

    def __init__(
        self,
        log: str | Path,
        header: dict[str, Any],
        checkpoint: Checkpoint,
        rules: Mapping[str, type[Rule]],
    ):
        self.rules = rules
        self.log, self.header, self.checkpoint = log, header, checkpoint
        entries = {entry["name"]: entry for entry in header["tensors"]}
        self.layout = layout_of(checkpoint, set(entries))
        self.trained: dict[Place, dict] = {}  # the log's entries
        for name, entry in entries.items():
            places = self.layout.find(name)
            if not places:
                raise InputError(_missing(log, name, checkpoint))
            self.trained |= dict.fromkeys(places, entry)
        for place, entry in self.trained.items():
            shape, kind = (checkpoint.tensors[place][what] for what in ("shape", "dtype"))
            if shape != entry["shape"] or checkpoint.dtype(place) is None:
                raise InputError(
                    f"{log} starts from another base model: {place.key} in {place.file} is {kind} "
                    f"of shape {shape}, the log has {entry['dtype']} of shape {entry['shape']}"
                )
        # the dtype in which the run loaded the model, if not the files': that of the rest, too
        dtypes = {entry["dtype"] for entry in entries.values()}
        cast = any(checkpoint.dtype(place) != e["dtype"] for place, e in self.trained.items())
        self.only = dtypes.pop() if len(dtypes) == 1 else None
        self.rest = self.only if cast else None

    def dtypes(self) -> dict[Place, str]:
        """What is cast, or may be: the dtype of each tensor of numbers."""
        known = {place: self.checkpoint.dtype(place) for place in self.checkpoint.tensors}
        floats = {place: self.rest or dtype for place, dtype in known.items() if dtype is not None}
        return floats | {place: entry["dtype"] for place, entry in self.trained.items()}

    def verify(self) -> None:
        """InputError unless the weights are those that the run began with."""
        for place, entry in self.trained.items():
            match(self.log, entry, _cast(self.checkpoint.read(place), entry["dtype"]), True)
        expected = self.header["frozen"]
        if expected is None:
            return
        frozen = _frozen(self.layout, {entry["name"] for entry in self.header["tensors"]})
        if frozen is None:
            logger = logging.getLogger("mezo")
            logger.warning(
                "%s: the files do not tell the order of the weights that the run kept "
                "frozen: they are not checked",
                self.log,
            )
            return
        for dtype in dict.fromkeys((self.rest, self.only, None)):  # None: as they are stored
            digests = (fingerprint(_cast(self.checkpoint.read(place), dtype)) for place in frozen)
            if hashlib.sha256("".join(digests).encode()).hexdigest()[:16] == expected:
                self.rest = dtype
                return
        raise InputError(FROZEN_DIFFER.format(self.log))

    def replaying(self, steps: Sequence[Step], progress: Progress | None):
        """A function from a place to its tensor after `steps`."""
        groups = {entry["group"] for entry in self.header["tensors"]}
        programs = {
            group: program_of(self.header, steps, group, known=self.rules) for group in groups
        }
        dtypes, done = self.dtypes(), 0

        def tensor_of(place: Place) -> torch.Tensor:
            nonlocal done
            tensor, entry = self.checkpoint.read(place), self.trained.get(place)
            tensor = _cast(tensor, dtypes.get(place))
            if entry is not None:
                make_(tensor, entry, self.header, programs[entry["group"]], {})
                done += 1
                if progress is not None:
                    progress(done, len(self.trained))
            return tensor

        return tensor_of


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """As loading does it."""
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def _frozen(layout: Layout, trained: set[str]) -> list[Place] | None:
    """The tensors that were not trained, in the model's order; None: that is not known."""
    if layout.order is None or not trained <= set(layout.order):
        return None
    places = [layout.places[name][:1] for name in layout.order if name not in trained]
    return [place for (place,) in places] if all(places) else None


def _missing(log: str | Path, name: str, checkpoint: Checkpoint) -> str:
    if name.startswith(("base_model.", "prompt_encoder.")):  # in peft's wrapper
        return (
            f"{log}: the run trained an adapter ({name}): its base stays as it is; "
            "mezo replay --onto_adapter writes the adapter"
        )
    return (
        f"{log}: {checkpoint.folder} has no tensor for {name}, which loading makes of others, or "
        "anew: replay it on the loaded model (mezo replay without --by_tensor)"
    )
