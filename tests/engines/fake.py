"""An engine written from nothing: a bigram model in torch tensors, with moves made by `noise`."""

import torch

from mezo import noise
from mezo.engines import Engine
from mezo.errors import InputError
from mezo.noise import tensor_key
from mezo.objectives.generation import Completion, gumbel


class Bigram(torch.nn.Module):
    """The same model for a replay: logits of the next token are a row of a table, and a bias."""

    def __init__(self, size=12):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.table = torch.nn.Parameter(torch.randn(size, size, generator=draw))
        self.bias = torch.nn.Parameter(torch.randn(size, generator=draw))


class FakeEngine(Engine):
    name = "fake"

    def __init__(self, model, tokenizer=None):
        self.theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.tokenizer = tokenizer

    def begin(self, run):
        for name, shape in run.shapes.items():
            if name not in self.theta or tuple(self.theta[name].shape) != shape:
                raise InputError(f"engine fake holds no parameter {name} of shape {shape}")
        self.run = run

    def moved(self, changes):
        found = {name: p.clone() for name, p in self.theta.items()}
        for names, moves in changes:
            for name in names:
                how = {"distribution": self.run.distribution}
                noise.apply_(found[name], tensor_key(self.run.seed, name), moves, **how)
        return found

    def at(self, point):
        self.theta = self.moved(point.walk)
        return self.moved(point.look)

    def logprobs(self, queries, points):
        found = []
        for weights in map(self.at, points):
            table = (weights["table"] + weights["bias"]).log_softmax(-1)
            found.append([[float(table[q.ids[i], token]) for i, token in q.asked] for q in queries])
        return found

    def texts(self, prompts, points, generation, draw=0):
        return [[self.write(w, *row, generation, draw) for row in enumerate(prompts)]
                for w in map(self.at, points)]  # fmt: skip

    def write(self, weights, row, prompt, generation, draw):
        ids, key = list(prompt), tensor_key(generation.seed, "mezo/generation")
        for place in range(generation.max_new_tokens):
            scores = weights["table"][ids[-1]] + weights["bias"]
            if generation.temperature:
                noise_of_row = gumbel(key, torch.tensor([row]), place, len(scores), draw)[0]
                scores = scores / generation.temperature + noise_of_row
            ids.append(int(scores.argmax()))
        made = ids[len(prompt) :]
        return Completion(tuple(made), " ".join(map(str, made)), False)

    def apply(self, update):
        self.theta = self.moved(update)

    def weights(self):
        yield from self.theta.items()
