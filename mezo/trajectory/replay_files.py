"""Replay from checkpoint files to checkpoint files, in the memory of one tensor.

    trajectory.replay_checkpoint("run.mezo", "opt-66b/", "tuned/")

The new files have the names, keys and order of the old ones. A parameter that does not correspond
to one stored tensor (experts that loading merges, a new head) cannot be rebuilt this way.
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
from mezo.trajectory.fingerprints import Comparison, fingerprint
from mezo.trajectory.format import Step
from mezo.trajectory.program import make_, program_of
from mezo.trajectory.replay import FROZEN_DIFFER, match, steps_until
from mezo.trajectory.stored_parameters import Layout, layout_of

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

    The result equals, to the bit, what `replay` gives on the loaded model. The memory needed is
    that of the largest tensor and, for 16-bit weights, of its rounding buffer. Untrained tensors,
    config and tokenizer are copied. If the run loaded the model in another dtype, the result has
    that dtype. An interrupted call never leaves an `output_dir` that looks complete.

    Args:
        log: The run log.
        source_dir: A local folder with model.safetensors, or with shards and their index.
        output_dir: Another folder; files of the same names in it are replaced.
        until: Stop before this step of the run; None replays all steps.
        verify: First read all tensors once and compare their fingerprints with the log's; then
            compare the tuned ones with its digests, before the new files get their names.
        rules: Your own rule classes that the run used.
        progress: Called as `progress(done, total)` after each trained tensor.

    Returns the number of steps replayed. Raises InputError if the log is of an adapter or starts
    from another base model, or if a trained parameter is not a tensor of the files; use `replay` on
    the loaded model for those.
    """
    run, output = read(log), Path(output_dir)
    steps, checkpoint = steps_until(log, run, until), Checkpoint(Path(source_dir))
    if output.resolve() == checkpoint.folder.resolve():
        raise InputError(f"output_dir {output} is the base model's own folder")
    plan = _Plan(log, run.header, checkpoint, known(rules))
    if verify:
        plan.verify()
    comparison = Comparison(log, run, until) if verify else None
    write(checkpoint, output, plan.replaying(steps, progress, comparison), plan.dtypes())
    return len(steps)


class _Plan:
    """What happens to each tensor of a checkpoint. Raises InputError if the log does not fit it."""

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
        # a run that loaded the model in another dtype gives that dtype to untrained tensors, too
        dtypes = {entry["dtype"] for entry in entries.values()}
        cast = any(checkpoint.dtype(place) != e["dtype"] for place, e in self.trained.items())
        self.only = dtypes.pop() if len(dtypes) == 1 else None
        self.rest = self.only if cast else None

    def dtypes(self) -> dict[Place, str]:
        """Return the dtype that each floating-point tensor has in the result."""
        stored = {place: self.checkpoint.dtype(place) for place in self.checkpoint.tensors}
        floats = {place: self.rest or dtype for place, dtype in stored.items() if dtype is not None}
        return floats | {place: entry["dtype"] for place, entry in self.trained.items()}

    def verify(self) -> None:
        """Raise InputError unless the weights are those that the run started from."""
        for place, entry in self.trained.items():
            match(self.log, entry, _cast(self.checkpoint.read(place), entry["dtype"]), True)
        expected = self.header["frozen"]
        if expected is None:
            return
        frozen = _frozen(self.layout, {entry["name"] for entry in self.header["tensors"]})
        if frozen is None:
            logger = logging.getLogger("mezo")
            logger.warning(
                "%s: the frozen weights are not verified, because the files do not determine "
                "their order",
                self.log,
            )
            return
        for dtype in dict.fromkeys((self.rest, self.only, None)):  # None: as they are stored
            digests = (fingerprint(_cast(self.checkpoint.read(place), dtype)) for place in frozen)
            if hashlib.sha256("".join(digests).encode()).hexdigest()[:16] == expected:
                self.rest = dtype
                return
        raise InputError(FROZEN_DIFFER.format(self.log))

    def replaying(
        self, steps: Sequence[Step], progress: Progress | None, comparison: Comparison | None
    ):
        """Return a function that gives the tensor of a place after `steps`.

        It raises InputError with the last trained one if the comparison finds a difference.
        """
        groups = {entry["group"] for entry in self.header["tensors"]}
        looks = () if comparison is None else comparison.steps
        how: dict[str, Any] = {"known": self.rules, "looks": looks}
        programs = {group: program_of(self.header, steps, group, **how) for group in groups}
        dtypes, done = self.dtypes(), 0

        def tensor_of(place: Place) -> torch.Tensor:
            nonlocal done
            tensor, entry = self.checkpoint.read(place), self.trained.get(place)
            tensor = _cast(tensor, dtypes.get(place))
            if entry is not None:
                look = None if comparison is None else comparison.look
                make_(tensor, entry, self.header, programs[entry["group"]], {}, look)
                done += 1
                if comparison is not None and done == len(self.trained):
                    comparison.finish()
                if progress is not None:
                    progress(done, len(self.trained))
            return tensor

        return tensor_of


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Cast as loading a model does; None leaves the tensor as it is."""
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def _frozen(layout: Layout, trained: set[str]) -> list[Place] | None:
    """Return the untrained tensors in the model's order, or None if that order is unknown."""
    if layout.order is None or not trained <= set(layout.order):
        return None
    places = [layout.places[name][:1] for name in layout.order if name not in trained]
    return [place for (place,) in places] if all(places) else None


def _missing(log: str | Path, name: str, checkpoint: Checkpoint) -> str:
    if name.startswith(("base_model.", "prompt_encoder.")):  # in peft's wrapper
        return (
            f"{log}: the run trained an adapter ({name}), and its base model is unchanged; "
            "mezo replay --onto_adapter writes the adapter"
        )
    return (
        f"{log}: {checkpoint.folder} has no tensor for {name}, which loading creates; replay on "
        "the loaded model instead (mezo replay without --by_tensor)"
    )
