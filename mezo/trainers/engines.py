"""The engine of a run on rewards: transformers in this process, or one that holds the weights."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mezo.engines import THETA, Engine, Point, RemoteWeights, Run, TransformersEngine, attach
from mezo.engines.engine import token_batch
from mezo.engines.reading import EngineReader
from mezo.engines.remote import check_choices as check_remote
from mezo.errors import InputError
from mezo.forms.weights import Weights
from mezo.mezo import MeZO
from mezo.optimizer import number_of_processes
from mezo.trainers.config import MeZOConfig, rule_of

ENGINES = ("transformers", "vllm")


def check(name: str, options: str | None, *, offload: bool = False) -> None:
    """Raise InputError, before a model is loaded, for an engine that cannot be started."""
    check_engine(name, options)
    if name == "transformers":
        return
    if offload:
        raise InputError(f"offload does not go with engine {name}, which has its own placement")
    from mezo.engines.vllm_engine import check_version

    check_version()


def check_choices(args: MeZOConfig) -> None:
    """Raise InputError, before an engine starts, for options of MeZO that no engine has."""
    check_remote(rule_of(args), args.perturbation, masked=args.keep is not None)


def check_engine(name: str, options: str | None = None) -> dict[str, Any]:
    """Return the options of an engine as a dict. Raises InputError for an unknown engine."""
    if name not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "transformers":
        if options:
            raise InputError("engine_options are for an engine other than transformers")
        return {}
    try:
        found = json.loads(options or "{}")
    except ValueError as error:
        raise InputError(f"engine_options is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"engine_options is a JSON object, got {options}")
    if "model" in found:
        raise InputError("engine_options name no model: the engine loads the run's own")
    return found


def started(name: str, model: torch.nn.Module, options: str | None) -> Engine | None:
    """Start the engine of that name on the files that `model` was loaded from; None if the model
    is to run in this process.

    Raises InputError for an adapter or a model without files, and as the engine does.
    """
    given = check_engine(name, options)
    if name == "transformers":
        return None
    if hasattr(model, "peft_config"):
        raise InputError(f"engine {name} trains the model's own weights: leave the adapter away")
    if number_of_processes() > 1:
        raise InputError(
            f"engine {name} spreads over GPUs itself: start one process, and give "
            "engine_options, such as '{\"tensor_parallel_size\": 8}'"
        )
    from mezo.engines.vllm_engine import VLLMEngine

    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1:
        raise InputError(f"engine {name} has one dtype for all weights, the model has {dtypes}")
    (dtype,) = dtypes
    config: Any = model.config
    return VLLMEngine(
        str(config._name_or_path), **{"dtype": str(dtype).removeprefix("torch.")} | given
    )


@contextmanager
def reading(
    name: str, model: torch.nn.Module, options: str | None, *, tuned: bool = False
) -> Iterator[EngineReader]:
    """Return a context with an engine that reads for evaluations.

    With `tuned` the model's weights, rebuilt from a run log, are given to the engine.
    """
    engine = started(name, model, options)
    assert engine is not None
    try:
        if tuned:
            named = {n: p.detach() for n, p in model.named_parameters()}
            engine.begin(Run({n: tuple(p.shape) for n, p in named.items()}, 0, "gaussian"))
            engine.take(named.items())
        yield EngineReader(engine)
    finally:
        engine.close()


class Held:
    """The engine of a trainer, and where the optimizer is in it."""

    def __init__(self, engine: Engine | None):
        self.engine = engine
        self.remote: RemoteWeights | None = None

    @property
    def is_remote(self) -> bool:
        """Whether the weights are elsewhere than in the trainer's model."""
        return self.engine is not None

    def of(self, model: torch.nn.Module, tokenizer: Any) -> Engine:
        """Return the engine to ask; in this process, the model as it is."""
        return TransformersEngine(model, tokenizer) if self.engine is None else self.engine

    def here(self) -> Point:
        """Return the point at which the optimizer is."""
        return THETA if self.remote is None else self.remote.point()

    def take_up(self, optimizer: MeZO) -> None:
        """Let the engine hold the weights of an optimizer that begins, or goes on."""
        if self.engine is None or isinstance(optimizer.weights, RemoteWeights):
            return
        goes_on = optimizer.settings["step"] > 0
        self.remote = attach(optimizer, self.engine, take=goes_on)

    def give(self, optimizer: MeZO) -> None:
        """Give the optimizer's parameters to the engine, as when the best weights were loaded."""
        if self.engine is not None and self.remote is not None:
            self.remote.flush()
            self.engine.take((name, p.detach()) for name, p, _ in optimizer.trained())

    def close(self, optimizer: MeZO | None) -> None:
        """Free the engine, and let the optimizer hold its weights again."""
        if self.engine is None:
            return
        if optimizer is not None:
            optimizer.weights = Weights()
        self.engine.close()
        self.engine = self.remote = None

    def losses_of_texts(self, engine: Engine, rows: Sequence[Sequence[int]]) -> float:
        """Return the mean of -log p over the tokens of texts, at the point of the optimizer."""
        batch = token_batch((row, 1) for row in rows)
        return engine.losses(batch, [self.here()])[0]
