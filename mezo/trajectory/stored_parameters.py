"""Which tensors of a checkpoint's files are which parameters of the model, without loading it.

The model is made without weights, on torch's meta device; transformers says how loading renames and
merges what the files hold, and which parameters are one (tied).
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
from mezo.trajectory.writer import fingerprint


@dataclass(frozen=True)
class Layout:
    """Where each parameter is stored, if it is: twice, if it is tied and both names are there."""

    places: dict[str, list[Place]]
    order: list[str] | None  # names as named_parameters has them; None: the model is not known
    prefix: str = ""  # of the base model's parameters in a model with a head

    def find(self, name: str) -> list[Place]:
        """The run may have had the base model where the files have a head on it, or reversed."""
        spellings = (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))
        return next((self.places[one] for one in spellings if self.places.get(one)), [])


def layout_of(checkpoint: Checkpoint, trained: set[str]) -> Layout:
    """The layout for the model that has all parameters in `trained`, if transformers knows one.

    Without it, keys are taken for names.
    """
    found = None
    try:
        for model in _skeletons(checkpoint.folder):
            found = _layout(model, checkpoint)
            if trained <= set(found.order or []):
                return found
    except Exception as error:  # a config can be wrong in any way, or of a model made elsewhere
        log = logging.getLogger("mezo")
        log.info("%s: keys are taken for names: %s", checkpoint.folder, error)
    return found or Layout({noise.canonical_name(p.key): [p] for p in checkpoint.tensors}, None)


def _skeletons(folder: Path) -> Iterator[Any]:
    """Models without weights: as `models.load` makes them, and as the config names them."""
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
    firsts: dict[int, str] = {}  # of tied parameters, the one that named_parameters names
    for name, p in model.named_parameters(remove_duplicate=False):
        here, first = stored.get(name, []), firsts.setdefault(id(p), noise.canonical_name(name))
        name = noise.canonical_name(name)
        if here and places.get(first) and not _equal(checkpoint, here[0], places[first][0]):
            first = name  # loading does not tie what is stored with two values
        places.setdefault(first, []).extend(here)
    return Layout(places, list(places), model.base_model_prefix)


def _equal(checkpoint: Checkpoint, *places: Place) -> bool:
    return len({fingerprint(checkpoint.read(place)) for place in places}) == 1


def _stored(model: Any, checkpoint: Checkpoint) -> dict[str, list[Place]]:
    """The tensors that loading puts into each parameter as they are, in transformers' own way."""
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
    found: dict[str, list[Place]] = {}
    for place in sorted(checkpoint.tensors, key=lambda place: dot_natural_key(place.key)):
        key, where = place.key, (model.base_model_prefix, state)
        name, merged = rename_source_key(key, renamings, mergers, *where)
        if name not in state and key in state:
            name, merged = rename_source_key(key, [], [], *where)
        if merged is None:
            found.setdefault(name, []).append(place)
    return found
