"""A thousand volunteers, simulated: late numbers, lies, checks, and the bytes that travel.

python -m experiments.volunteers --data_dir DATA    # the cells that are missing; DATA/SST-2 is read
python -m experiments.tables                        # the tables; --plots: docs/volunteers.png

It writes experiments/results/volunteers.json; --quick tries one seed for a twentieth of the steps.
The embedded causal model learns SST-2 from 512 examples a label in 600 forward passes of 16
examples, as in experiments/ablation.py. "one z": a step has one direction, and each of 16
volunteers the losses of one example. "own z": a step has 8 directions, each volunteer its own.
"""

import argparse
import json
import math
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mezo import MeZO, tasks, trajectory
from mezo.demo.tune import batches
from mezo.distributed.processes import Processes
from mezo.distributed.sharding import Sharded
from mezo.errors import InputError
from mezo.estimators import Estimate, clipped
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating
from mezo.objectives import form_for
from mezo.optimizer import OneProcess
from mezo.runs.result import environment

SEEDS = (13, 21)
RESULTS = Path(__file__).parent / "results"
PASSES, BATCH, EPS = 600, 16, 1e-3
PEOPLE = 100  # of whom a step asks 16, or 8: each contributes 24 to 48 times in a run
RUN, CROWD = 20_000, 1_000  # steps and volunteers of the run that is counted without a model


@dataclass(frozen=True)
class Setting:
    """What a run suffers. The rates: ablation.py's for n = 1, and between its n = 4 and n = 16."""

    own_z: bool = False
    slower: float = 1  # the rate is divided by it
    late: int = 0  # steps by which the weights that are measured at are behind
    random: bool = False  # uniform in 0 .. 2 late instead, each direction by itself
    dropped: float = 0.0  # share of contributions that never come
    lie: str = ""  # noise, 10 times the honest; flipped; huge: flipped, 1,000 times
    share: float = 0.0  # of the volunteers
    defence: str = ""  # "fixed x", "clip q": MeZO's bounds; "each q": of each; median, middle
    checked: float = 0.0  # share of contributions that are repeated; who lied is expelled

    @property
    def directions(self) -> int:
        return 8 if self.own_z else 1

    @property
    def lr(self) -> float:
        return (3e-3 if self.own_z else 6e-4) / self.slower

    @property
    def name(self) -> str:
        told = [f"{k} {v}" for k, v in asdict(self).items() if v != asdict(Setting())[k]]
        return ", ".join(told) or "plain"


def settings() -> list[Setting]:
    found = [Setting(late=s) for s in (0, 1, 2, 4, 8, 16, 32, 64)]
    found += [Setting(late=s, slower=3) for s in (0, 32, 64)]
    found += [Setting(late=32, random=True), Setting(dropped=0.5)]
    found += [Setting(True, late=s) for s in (0, 2, 4, 8)]
    found += [Setting(True, late=s, slower=3) for s in (0, 8)]
    found += [Setting(True, late=4, random=True)]
    found += [Setting(defence=d) for d in ("each 0.5", "median", "middle")]
    against = {"noise": ["", "clip 0.5", "each 0.5", "median"], "flipped": ["", "median"]}
    against |= {"huge": ["", "clip 0.5", "fixed 10", "each 0.9", "each 0.5"]}
    against["huge"] += ["median", "middle"]
    for lie, defences in against.items():
        found += [Setting(lie=lie, share=0.2, defence=d) for d in defences]
        found += [Setting(lie=lie, share=0.2, checked=0.05)]
    found += [Setting(lie="flipped", share=0.4, checked=p) for p in (0.0, 0.05)]
    found += [Setting(lie="huge", share=0.2, defence="median", checked=0.05)]
    own = {"noise": ["", "clip 0.5"], "huge": ["clip 0.9", "clip 0.5", "fixed 10"]}
    found += [Setting(True, lie=lie, share=0.2, defence=d) for lie in own for d in own[lie]]
    return found


class Crowd(OneProcess):
    """Volunteers behind a step: their numbers come together here, as those of processes would."""

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.random = setting, np.random.default_rng(seed)
        self.liars = set(range(round(setting.share * PEOPLE)))
        self.there = list(range(PEOPLE))
        self.made = dict.fromkeys(self.liars, 0)  # contributions of each liar
        self.found: dict[int, int] = {}  # liar -> contributions until it was expelled
        self.honest: list[np.ndarray] = []  # projected_grads by direction, an entry a volunteer
        self.loss = 0.0
        self.history: tuple[float, ...] = ()

    def estimate(self, optimizer: MeZO, model, form, batch, probe: int) -> None:
        """The honest numbers of one direction, at the weights that the model has now."""
        seen: list[torch.Tensor] = []

        def closure() -> float:
            each = F.cross_entropy(form.scores(model, batch), batch["labels"], reduction="none")
            seen.append(each.double())
            return float(each.mean())

        self.loss = optimizer.estimate(closure, probe).loss
        grads = ((seen[0] - seen[1]) / (2 * EPS)).numpy()
        self.honest.append(grads.mean(keepdims=True) if self.setting.own_z else grads)

    def joined(self, optimizer):
        sizes = [len(grads) for grads in self.honest]
        ids = self.random.choice(self.there, sum(sizes), replace=sum(sizes) > len(self.there))
        honest, told = np.concatenate(self.honest), np.concatenate(self.honest)
        scale = float(np.sqrt(np.mean(honest**2)))
        for at, who in enumerate(ids):
            if who in self.liars:
                told[at] = self._lie(honest[at], scale)
        came = self.random.random(len(told)) >= self.setting.dropped
        rows = zip(*(np.split(x, np.cumsum(sizes)[:-1]) for x in (told, came)), strict=True)
        estimates = [self._defended(one[here]) for one, here in rows]
        self._check(ids)
        self.honest = []
        self.latest = {i: [Estimate(g, self.loss)] for i, g in enumerate(estimates)}
        return self.latest, (1,) * len(estimates)

    def _lie(self, honest: float, scale: float) -> float:
        kinds = {"noise": 10 * scale * self.random.standard_normal(), "flipped": -honest}
        return float((kinds | {"huge": -1000 * honest})[self.setting.lie])

    def _defended(self, told: np.ndarray) -> float:
        """One number of a direction's; 0 if none came."""
        if not len(told):
            return 0.0
        defence, _, bound = self.setting.defence.partition(" ")
        if defence == "each":
            group = {"clip": None, "clip_quantile": float(bound)}
            bounded, self.history = clipped(dict(enumerate(told.tolist())), group, self.history)
            return mean(bounded.values())
        if defence == "middle":  # without the highest and the lowest quarter
            quarter = len(told) // 4
            return float(np.sort(told)[quarter : len(told) - quarter].mean())
        return float(np.median(told) if defence == "median" else told.mean())

    def _check(self, ids: np.ndarray) -> None:
        """Some of what was applied is repeated by others; rounding is `rounding`'s matter."""
        for who in map(int, ids):
            if who in self.made and who not in self.found:
                self.made[who] += 1
                if self.random.random() < self.setting.checked:
                    self.found[who] = self.made[who]
                    self.there.remove(who)


class Task:
    """The model's weights, and SST-2; `steps`: as a share of those that there should be."""

    def __init__(self, data: Path, steps: float):
        self.steps, self.task = steps, tasks.get("sst2")
        where = {"data_dir": str(data / "SST-2")}
        self.all = tasks.load_examples(self.task, "train", **where)
        self.test = tasks.load_examples(self.task, "test", **where)

    def begin(self, seed: int):
        model, tokenizer = models.load(ModelArguments("causal-lm"))
        form = form_for(model, tokenizer, self.task)
        train, _ = tasks.few_shot(self.all, 512, seed)
        return model, form, batches([form.encode(e) for e in train], BATCH, seed)

    def learn(self, setting: Setting, seed: int) -> dict[str, Any]:
        model, form, stream = self.begin(seed)
        defence, _, bound = setting.defence.partition(" ")
        options = {"clip": "clip_quantile", "fixed": "clip"}
        bounds = {options[defence]: float(bound)} if defence in options else {}
        optimizer = optimizer_of(model, setting, seed, **bounds)
        crowd = optimizer.processes = Crowd(setting, seed)
        steps = round(PASSES * self.steps) // (2 * setting.directions)
        weights, kept = list(model.parameters()), setting.late * (1 + setting.random) + 1
        past: deque[list[torch.Tensor]] = deque(maxlen=kept)
        with evaluating(model):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = setting.lr * (1 - step / steps)
                past.append([p.clone() for p in weights])
                try:
                    for probe in range(setting.directions):
                        late = crowd.random.integers(kept) if setting.random else setting.late
                        load(weights, past[-1 - min(late, len(past) - 1)])
                        batch = form.collate(next(stream))
                        crowd.estimate(optimizer, model, form, batch, probe)
                    load(weights, past[-1])
                    optimizer.step()
                except InputError:  # the loss is not finite any more
                    break
        result = evaluate(model, form, self.test)
        loss = result.loss if math.isfinite(result.loss) else None  # JSON has no NaN
        found = {"accuracy": result.accuracy, "loss": loss, "setting": asdict(setting)}
        return found | {"made": crowd.made, "found": crowd.found}


def optimizer_of(model, setting: Setting, seed: int, **options) -> MeZO:
    given: dict[str, Any] = {"distribution": "rademacher", "num_samples": setting.directions}
    return MeZO(model.named_parameters(), setting.lr, eps=EPS, seed=seed, **(given | options))


@torch.no_grad()
def load(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for p, value in zip(weights, values, strict=True):
        p.copy_(value)


def other_conditions(model, form, optimizer: MeZO) -> dict[str, Any]:
    """The same step's projected_grad as other volunteers would compute it: name -> of a batch."""
    half, _ = models.load(ModelArguments("causal-lm", dtype="bfloat16"))

    def plain(features, model=model, perturbation="in_place") -> float:
        group = optimizer.param_groups[0]
        own = optimizer_of(model, Setting(), group["seed"], perturbation=perturbation)
        own.param_groups[0]["step"] = group["step"]
        return own.estimate(form.closure(model, form.collate(features))).projected_grad

    def within(switch, there, back):
        def compute(batch) -> float:
            switch(there)
            try:
                return plain(batch)
            finally:
                switch(back)

        return compute

    def cast(batch) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch)

    def halved(batch) -> float:
        load(list(half.parameters()), list(model.parameters()))
        return plain(batch, half, "scratch")

    return {
        "again": plain,
        "2 threads": within(torch.set_num_threads, 2, torch.get_num_threads()),
        "4 parts": lambda batch: mean(plain(batch[i : i + 4]) for i in range(0, BATCH, 4)),
        "eager attention": within(model.set_attn_implementation, "eager", "sdpa"),
        "scratch": lambda batch: plain(batch, perturbation="scratch"),
        "bf16 products": cast,
        "bf16 weights": halved,
    }


def rounding(task: Task) -> dict[str, Any]:
    """A record computed once more under other conditions, at each step of a run of 100."""
    model, form, stream = task.begin(SEEDS[0])
    optimizer = optimizer_of(model, Setting(), SEEDS[0])
    grads: list[float] = []
    optimizer.observers.append(lambda record: grads.append(record.projected_grads[0]))
    with evaluating(model):
        conditions = other_conditions(model, form, optimizer)
        others: dict[str, list[float]] = {name: [] for name in conditions}
        for _ in range(round(100 * task.steps)):
            batch = next(stream)
            weights = [p.clone() for p in model.parameters()]
            for name, compute in conditions.items():
                others[name].append(compute(batch))
                load(list(model.parameters()), weights)  # a walk in place rounds them
            optimizer.step(form.closure(model, form.collate(batch)))
    return tolerances(np.array(grads), others) | {"grads": grads, "others": others}


def tolerances(grads: np.ndarray, others: dict[str, list[float]]) -> dict[str, Any]:
    """Differences relative to |projected_grad|, and to its root mean square over the run.

    `bound` is twice the largest difference in the first half; `alarms` are those beyond it in the
    second half, `missed` the lies within it: another step's number, and the flipped one.
    """
    scale, half = float(np.sqrt(np.mean(grads**2))), len(grads) // 2
    found: dict[str, Any] = {}
    for name, values in others.items():
        away = np.abs(np.array(values) - grads)
        row: dict[str, Any] = {"honest": len(grads) - half}
        for key, part in (("relative", away / np.abs(grads)), ("of_rms", away / scale)):
            of = {"median": 0.5, "99 %": 0.99, "most": 1.0}
            row[key] = {which: float(np.quantile(part, q)) for which, q in of.items()}
        bound = 2 * float(away[:half].max())
        row |= {"bound": bound / scale, "alarms": int((away[half:] > bound).sum())}
        row["missed_random"] = float((np.abs(np.roll(grads, 7) - grads) <= bound).mean())
        row["missed_flipped"] = float((2 * np.abs(grads) <= bound).mean())
        found[name] = row
    return {"rms": scale, "conditions": found}


def checks(task: Task) -> dict[str, Any]:
    """1,000 volunteers, 100 liars, every step a number from each: how soon are liars found?"""
    steps, random = round(RUN * task.steps), np.random.default_rng(0)
    found: dict[str, Any] = {}
    for p in (0.001, 0.01, 0.1):
        lies = np.full(100, steps + 1)  # contributions of each until it is expelled
        for step in range(1, steps + 1):
            lies[(random.random(100) < p) & (lies > steps)] = step
        row: dict[str, Any] = {"median": float(np.median(lies)), "last": int(lies.max())}
        row["lies_of_all"] = float(np.minimum(lies, steps).sum() / (steps * CROWD))
        row["within"] = {str(m): float((lies <= m).mean()) for m in (10, 69, 458, 4580)}
        row["formula"] = {m: 1 - (1 - p) ** int(m) for m in row["within"]}
        found[str(p)] = row
    return found


class Counted(Processes):
    """The library's exchange among 1,000 processes, of which one exists: bytes are counted."""

    def __init__(self, optimizer: MeZO, probes: int):
        self._optimizer, self.rank, self.size, self.sent = optimizer, 0, CROWD, 0
        self.probes, self.place, self.check_every = probes, 0, 0
        self._sharded, self._history, self._weights = Sharded(None, optimizer), 0, 0

    def expect(self, count: int) -> None:
        """Nothing comes."""

    def exchange(self, values):
        """Everybody else found what this one has, along its own direction."""
        self.sent = 8 * len(values)
        checks, own, rest = values[:2], values[2:8], len(values) - 8
        places = [6 * i if rest else 0 for i in range(self.size)]
        return [[*checks, *[0.0] * at, *own, *[0.0] * (rest - at)] for at in places]


def traffic(task: Task) -> dict[str, Any]:
    """Bytes of a step and of a log, as the library writes them; and of a run with joiners."""
    found: dict[str, Any] = {}
    for name, n in {"one z": 1, "own z": CROWD}.items():
        model, form, stream = task.begin(SEEDS[0])
        optimizer = optimizer_of(model, Setting(), 1, num_samples=n, perturbation="scratch")
        counted = optimizer.processes = Counted(optimizer, n)
        with tempfile.TemporaryDirectory() as folder, evaluating(model):
            path, sizes = Path(folder, "run.mezo"), []
            with trajectory.record(optimizer, path, model=model):
                for _ in range(3):
                    batch, began = form.collate(next(stream)), time.perf_counter()
                    optimizer.estimate(form.closure(model, batch))
                    forward, began = time.perf_counter() - began, time.perf_counter()
                    optimizer.step()
                    sizes.append(path.stat().st_size)
        record = sizes[-1] - sizes[-2]
        row: dict[str, Any] = {"row": counted.sent, "record": record, "header": sizes[0] - record}
        row |= {"estimate_seconds": forward, "update_seconds": time.perf_counter() - began}
        found[name] = row | churn(row, round(RUN * task.steps))
    return found


def churn(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Bytes of a run of 3 s a step, in which half of the volunteers are replaced every hour.

    "direct": each sends its row to all others. "hub": each sends 24 bytes (two sums, a number; of
    its own z 8), and gets the record. Who joins gets the log.
    """
    random, leave = np.random.default_rng(0), 1 - 0.5 ** (3 / 3600)
    found = dict.fromkeys(("direct", "hub_up", "hub_down", "logs", "joined"), 0)
    for step in range(steps):
        found["direct"] += row["row"] * CROWD * (CROWD - 1)
        found["hub_up"] += (8 if row["record"] > 1000 else 24) * CROWD
        found["hub_down"] += row["record"] * CROWD
        joining = int(random.binomial(CROWD, leave)) if step else CROWD
        found["joined"] += joining
        found["logs"] += joining * (row["header"] + step * row["record"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    out = RESULTS / f"volunteers{'-quick' if args.quick else ''}.json"
    found = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    task = Task(args.data_dir, 1 / 20 if args.quick else 1.0)
    runs: dict[str, Any] = {c.__name__: partial(c, task) for c in (rounding, checks, traffic)}
    for seed in SEEDS[: 1 if args.quick else None]:
        runs |= {f"{one.name}, seed {seed}": partial(task.learn, one, seed) for one in settings()}
    for key in (key for key in runs if key not in found["cells"]):
        began = time.perf_counter()
        cell = runs[key]()
        found["cells"][key] = cell | {"seconds": time.perf_counter() - began}
        out.write_text(json.dumps(found | {"environment": environment()}, indent=1))
        print(key, cell.get("loss"), cell.get("accuracy"), flush=True)


if __name__ == "__main__":
    main()
