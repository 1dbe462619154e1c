"""Which stored tensors of a checkpoint are which parameters of its model, without loading weights.

The model is created on torch's meta device. transformers says how loading renames and merges the
stored tensors, and which parameters are tied.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezo import noise
from mezo.models import loading as models
from mezo.models.safetensors_files import Checkpoint, Place
from mezo.trajectory.fingerprints import fingerprint


@dataclass(frozen=True)
class Layout:
    """Where each parameter is stored; a tied parameter can be stored under both of its names."""

    places: dict[str, list[Place]]
    order: list[str] | None  # names in the order of named_parameters; None if the model is unknown
    prefix: str = ""  # prefix of the base model's parameters in a model with a head

    def find(self, name: str) -> list[Place]:
        """Return where a parameter is stored; [] if it is not.

        The run may have used the base model of files that have a head, or the other way round.
        """
        spellings = (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))
        return next((self.places[key] for key in spellings if self.places.get(key)), [])


def layout_of(checkpoint: Checkpoint, trained: set[str]) -> Layout:
    """Return the layout for the model that has all parameters in `trained`.

    If transformers knows no such model, the stored keys are taken for the parameters' names.
    """
    layout = None
    try:
        for model in _skeletons(checkpoint.folder):
            layout = _layout(model, checkpoint)
            if trained <= set(layout.order or []):
                return layout
    except Exception as error:  # a config can be wrong in any way, or of an unknown model
        log = logging.getLogger("mezo")
        log.info("%s: keys are taken for names: %s", checkpoint.folder, error)
    return layout or Layout({noise.canonical_name(p.key): [p] for p in checkpoint.tensors}, None)


def _skeletons(folder: Path) -> Iterator[Any]:
    """Yield models without weights: the one that `models.load` makes, then the config's own."""
    if not (folder / "config.json").is_file():
        return
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = config.architectures or []
    with torch.device("meta"):
        yield getattr(transformers, models.AUTO[models.kind_of(named)]).from_config(config)
        if named and hasattr(transformers, named[0]):
            yield getattr(transformers, named[0])(config)


def _layout(model: Any, checkpoint: Checkpoint) -> Layout:
    stored = _stored(model, checkpoint)
    places: dict[str, list[Place]] = {}
    firsts: dict[int, str] = {}  # for tied parameters, the name that named_parameters gives
    for name, p in model.named_parameters(remove_duplicate=False):
        here, first = stored.get(name, []), firsts.setdefault(id(p), noise.canonical_name(name))
        name = noise.canonical_name(name)
        if here and places.get(first) and not _equal(checkpoint, here[0], places[first][0]):
            first = name  # loading does not tie parameters that are stored with different values
        places.setdefault(first, []).extend(here)
    return Layout(places, list(places), model.base_model_prefix)


def _equal(checkpoint: Checkpoint, *places: Place) -> bool:
    return len({fingerprint(checkpoint.read(place)) for place in places}) == 1


def _stored(model: Any, checkpoint: Checkpoint) -> dict[str, list[Place]]:
    """Return the stored tensors that loading copies unchanged into each parameter.

    The renaming is done by transformers' own functions.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state, changes = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    mergers = [change for change in changes if isinstance(change, WeightConverter)]
    stored: dict[str, list[Place]] = {}
    for place in sorted(checkpoint.tensors, key=lambda place: dot_natural_key(place.key)):
        key, where = place.key, (model.base_model_prefix, state)
        name, merged = rename_source_key(key, renamings, mergers, *where)
        if name not in state and key in state:
            name, merged = rename_source_key(key, [], [], *where)
        if merged is None:
            stored.setdefault(name, []).append(place)
    return stored
