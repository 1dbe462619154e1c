"""Engines that hold the weights and run the model for MeZO: transformers, vLLM, or one of yours."""

from mezo.engines.engine import THETA, Batch, Change, Engine, Point, Query, Run
from mezo.engines.remote import RemoteWeights, attach
from mezo.engines.transformers_engine import TransformersEngine

__all__ = ["THETA", "Batch", "Change", "Engine", "Point", "Query", "RemoteWeights", "Run"]
__all__ += ["TransformersEngine", "attach"]
