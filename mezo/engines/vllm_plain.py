"""On a CPU, vLLM packs matrices and drops them; this keeps them, and reads them where they are.

It is a quantization config of vLLM, registered as vLLM's documentation says, that quantises
nothing. On a GPU vLLM keeps its matrices, and nothing of this is used.
"""

import os
from shutil import which
from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

NAME = "mezo_plain"
FEW = 32  # rows, as when a batch writes its next tokens


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x weight' + bias. Few 16-bit rows are multiplied from the other side: on a CPU with
    matrix instructions this reads an unpacked weight in 0.6 of the time."""
    if x.dtype == torch.float32 or x.dim() != 2 or len(x) > FEW:
        return F.linear(x, weight, bias)
    found = (weight @ x.T).T.contiguous()  # vLLM's kernels want rows in one piece
    return found if bias is None else found.add_(bias)


def _product_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# One operator to torch.compile, which would otherwise keep the branch of the rows that it has seen.
_LIBRARY = torch.library.Library("mezo", "FRAGMENT")
direct_register_custom_op(
    "plain_product", product, fake_impl=_product_shape, target_lib=_LIBRARY, dispatch_key="CPU"
)


def compiles() -> bool:
    """Return whether torch.compile finds a C++ compiler, without which vLLM runs layer by layer."""
    return which(os.environ.get("CXX", "g++")) is not None


class PlainLinear(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(self, layer, x, bias=None):
        return torch.ops.mezo.plain_product(x, layer.weight, bias)


class PlainEmbedding(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(self, layer, x, bias=None):
        return torch.ops.mezo.plain_product(x, layer.weight, bias)


@register_quantization_config(NAME)
class PlainWeights(QuantizationConfig):
    """Weights as they are, which moves can reach."""

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PlainWeights":
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return PlainLinear()
        return PlainEmbedding() if isinstance(layer, VocabParallelEmbedding) else None
