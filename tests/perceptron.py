"""A perceptron, its data and its loss, for the tests in which several processes train one."""

import hashlib

import torch

from mezo.errors import InputError

OPTIONS = {"lr": 1e-2, "eps": 1e-2, "seed": 3}


def model(dtype=torch.float32, seed=0, width=7):
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        layers = [torch.nn.Linear(5, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)]
        return torch.nn.Sequential(*layers).to(dtype)


def points(count, dtype=torch.float32):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, x.sum(1, keepdim=True).sin()


def loss(net, x, y):
    return (net(x) - y).square().mean()


def weights(net):
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


def digest(net):
    return hashlib.sha256(weights(net).numpy().tobytes()).hexdigest()


def message(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return ""
