"""Models small enough for a test: random weights of many architectures, nets that are a loss."""

import pytest
import reference
import torch
import transformers  # a class is imported when it is first asked for: that takes seconds
from packaging.version import Version

from mezo.closures import Paired

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"initializer_range": 0.3}  # weights large enough that a wrong position shows in the scores
LENGTH = 64  # context of all models


def tiny_model(name, vocabulary=400, context=LENGTH):
    """A random model in float64, evaluation mode."""
    shape = SHAPE | WIDE | {"vocab_size": vocabulary, "max_position_embeddings": context}
    bert = {"intermediate_size": 32, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.random.manual_seed(7)
        made = {
            "opt": lambda: transformers.OPTForCausalLM(
                transformers.OPTConfig(
                    **_opt(shape), ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0
                )
            ),
            "llama": lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**shape, intermediate_size=32)
            ),
            "qwen2": lambda: transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**shape, intermediate_size=32, num_key_value_heads=1)
            ),
            "gpt2": lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=2)
            ),
            "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**shape, **bert)),
            "roberta": lambda: transformers.RobertaForMaskedLM(
                transformers.RobertaConfig(
                    **(shape | {"max_position_embeddings": context + 1}), **bert
                )
            ),
            "encoder": lambda: transformers.BertModel(transformers.BertConfig(**shape, **bert)),
        }[name]()
    return made.double().eval()


def _opt(shape):
    return {("init_std" if key == "initializer_range" else key): v for key, v in shape.items()}


def llama(seed=0, dropout=0.0):
    """Random weights: vocabulary 64, hidden 16, 2 layers; about 6,000 parameters."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "max_position_embeddings": 32}
        config = transformers.LlamaConfig(
            vocab_size=64, attention_dropout=dropout, **shape, **heads
        )
        return transformers.LlamaForCausalLM(config)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def walked_home(before, eps, steps=1):
    """The bound on what `steps` walks leave behind: 3 roundings each, of at most |p| + 6 eps."""
    return steps * 3 * ROUNDING[before.dtype] * (before.abs() + 6 * eps)


class Toy(torch.nn.Module):
    """Regression in float64: a loss that is a plain mean and takes no number of items."""

    def __init__(self, broken_backward=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.broken_backward = broken_backward

    def forward(self, x, labels):
        y = Undifferentiable.apply(self.layer(x)) if self.broken_backward else self.layer(x)
        return {"loss": (y.squeeze(-1) - labels).square().mean()}


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a backward pass ran")


ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


class Regression(torch.nn.Module):
    """A small network and its data: `model()` is the loss."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        self.x, self.y = x.to(dtype), x.sin().sum(1, keepdim=True).to(dtype)
        for name, shape in {"first": (16, 6), "bias": (16,), "last": (1, 16)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
            setattr(self, name, torch.nn.Parameter(value.to(dtype)))

    def forward(self):
        hidden = torch.tanh(self.x @ self.first.T + self.bias)
        return ((hidden @ self.last.T - self.y) ** 2).mean()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SMALL |= {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "initializer_range": 0.2,
}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
DIMENSIONS = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ARCHITECTURES = {  # what is unlike the six above
    "mixtral": EXPERTS,  # experts' weights in three dimensions
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": EXPERTS,  # and their biases; attention sinks
    "gemma": {},  # norms by 1 + weight, a scaled embedding
    "gemma3_text": {},
    "mistral": {},
    "phi": {},  # a bias of the head
    "phi3": {},  # one matrix for query, key and value, another for gate and up
    "mamba": {"state_size": 4},  # parameters that are no layer's weight
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": HEADS,
    "albert": {"embedding_size": 16},  # one layer, used twice
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "t5": DIMENSIONS | {"decoder_start_token_id": 0},  # a bias shared between layers
}


def architecture(name, dtype):
    if name == "gpt_oss" and Version(torch.__version__) < Version("2.11"):
        pytest.skip("transformers asks for its experts' addresses before torch 2.11; refused")
    config = transformers.AutoConfig.for_model(name, **(SMALL | ARCHITECTURES[name]))
    kind = {"t5": transformers.AutoModelForSeq2SeqLM, "albert": transformers.AutoModelForMaskedLM}
    kind |= {
        "deberta": transformers.AutoModelForMaskedLM,
        "deberta-v2": transformers.AutoModelForMaskedLM,
    }
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        made = kind.get(name, transformers.AutoModelForCausalLM).from_config(config)
    return made.to(dtype).eval()


class Counted(torch.nn.Module):
    """A regression; counts its forward passes, and can mix up the rows of its batch."""

    def __init__(self, turned=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.5
        self.x = torch.randn(8, 6, generator=generator)
        self.turned, self.calls = turned, 0

    def forward(self, x):
        self.calls += 1
        x = x.flip(0) if self.turned else x
        y = self.last(torch.tanh(self.first(x))).squeeze(-1)
        return ((y.flip(0) if self.turned else y) - x.sin().sum(-1)) ** 2

    def paired(self):
        def halves(both):
            with both(batch_size=len(self.x)):
                plus, minus = self(torch.cat([self.x, self.x])).chunk(2)
            return plus.mean(), minus.mean()

        return Paired(lambda: self(self.x).mean(), halves)


class Rows(torch.utils.data.Dataset):
    """Eight examples for `Line`."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": torch.full((3,), float(i)), "labels": torch.tensor(float(i))}


class Line(torch.nn.Module):
    """A linear regression as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(self.line.weight, 0.1)
        torch.nn.init.constant_(self.line.bias, 0.0)

    def forward(self, x, labels):
        out = self.line(x).squeeze(1)
        return {"loss": (out - labels).square().mean(), "logits": out}


SIZES = {"a": 3, "b": 5}  # two tensors of a quadratic of 8 variables


class Quadratic(torch.nn.Module):
    """A loss of two tensors, of SIZES elements, whose gradient and curvature are known."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.hessian, self.b, self.value = reference.quadratic(8)
        for name, size in SIZES.items():
            setattr(self, name, torch.nn.Parameter(torch.ones(size, dtype=dtype)))
        self.calls = 0

    def forward(self):
        self.calls += 1
        return self.value(torch.cat([self.a.detach(), self.b_part()]).double())

    def b_part(self):
        return self._parameters["b"].detach()

    def __setattr__(self, name, value):  # the tensor b and the parameter b
        if name == "b" and not isinstance(value, torch.nn.Parameter):
            name = "linear"
        super().__setattr__(name, value)


def gradient(model):
    """The gradient of a `Quadratic` where all its elements are 1."""
    return model.hessian @ torch.ones(8, dtype=torch.float64) + model.linear
