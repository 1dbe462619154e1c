"""A few steps with the installed package, away from the source tree; prints its version."""

from importlib import resources
from pathlib import Path

import torch

import mezo

assert Path(__file__).parents[1] not in Path(mezo.__file__).parents, mezo.__file__
for folder in ("causal_lm", "opinions"):  # the demo's model and data are in the package
    assert any(resources.files("mezo.demo").joinpath(folder).iterdir()), folder

torch.manual_seed(0)
model, x = torch.nn.Linear(8, 1).eval(), torch.randn(64, 8)
y = x.sum(1, keepdim=True)
optimizer = mezo.MeZO(model.named_parameters(), lr=1e-2)
losses = [optimizer.step(lambda: (model(x) - y).square().mean()) for _ in range(100)]
assert losses[-1] < losses[0], losses
print(f"mezo {mezo.__version__}: loss {losses[0]:.3f} to {losses[-1]:.3f} in 100 steps")
