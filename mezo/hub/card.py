"""The model card of a run log: what it is, how to rebuild the model, and the log's own numbers."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mezo import tasks, trajectory

CARD = """\
---
{metadata}
---

# {repo}

A fine-tuning run of MeZO ([arXiv:2305.17333](https://arxiv.org/abs/2305.17333)), as its log. There
are no weights here: `run.mezo`, {size:,} bytes, holds the seed and the projected gradients of
{steps:,} steps, from which the tuned weights are rebuilt out of those of the base model, bit for bit
and without data.

## Rebuild the model

```sh
mezo pull {repo} --output run.mezo
mezo replay --model {base} --log run.mezo --output_dir tuned
```

```python
import mezo

model = mezo.load("{base}", "{repo}")
```
{hint}
## Settings

{settings}

## Fingerprints

The first 16 hexadecimal digits of SHA-256 of each trained tensor at the start of the run, and of
the digests of all others. A replay compares them with the base model's.

| | |
|---|---|
| `run.mezo`, SHA-256 | `{digest}` |
| weights kept frozen | {frozen} |

<details><summary>{count:,} trained tensors</summary>

{tensors}

</details>

## Citation

```bibtex
@inproceedings{{malladi2023mezo,
  title={{Fine-Tuning Language Models with Just Forward Passes}},
  author={{Malladi, Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and Lee, Jason D. and Chen, Danqi and Arora, Sanjeev}},
  booktitle={{Advances in Neural Information Processing Systems}},
  year={{2023}}
}}
```
"""  # noqa: E501
TAGS = ["mezo", "zeroth-order"]
_LOCAL = (
    "_dir",
    "_file",
    "_or_path",
    "run_name",
)  # endings of options that name the owner's folders


def card(path: str | Path, repo: str, base_model: str | None = None) -> str:
    """Return the model card, in Markdown, of the run log at `path` as the repository `repo`.

    `base_model` is the base's name on the hub, if it has one. The card says nothing that is not in
    the log.
    """
    from huggingface_hub import ModelCardData

    log = trajectory.read(path)
    header, data = log.header, Path(path).read_bytes()
    metadata = ModelCardData(
        base_model=base_model,
        library_name="mezo-lm",
        tags=TAGS,
        datasets=_datasets(header["config"]),
    )
    hint = "" if base_model else "\nBASE_MODEL is the model with the fingerprints below.\n"
    if (origin := header["config"].get("gguf_sha256")) is not None and not base_model:
        hint = f"\nBASE_MODEL is the GGUF file with the SHA-256 {_code(origin)}.\n"
    wrapped = ("base_model.", "prompt_encoder.")  # peft's names
    adapter = any(tensor["name"].startswith(wrapped) for tensor in header["tensors"])
    if adapter and "use_peft" not in header["config"]:
        hint += "\nThe log does not say how its adapter was made: give `load` a model with it.\n"
    rows = ((t["name"], t["dtype"], t["shape"], t["sha256"]) for t in header["tensors"])
    return CARD.format(
        metadata=metadata.to_yaml(),
        repo=repo,
        size=len(data),
        steps=len(log.steps),
        base=base_model or "BASE_MODEL",
        hint=hint,
        settings=_table(("setting", "value"), _settings(log).items()),
        digest=hashlib.sha256(data).hexdigest(),
        frozen=_code(header["frozen"]) if header["frozen"] else "none",
        count=len(header["tensors"]),
        tensors=_table(("tensor", "dtype", "shape", "digest"), rows),
    )


def _datasets(config: dict[str, Any]) -> list[str] | None:
    """Return the task's data set on the hub, if the run read that."""
    task = config.get("task")
    known = tasks.TASKS.get(task) if isinstance(task, str) else None
    local = any(config.get(name) for name in ("data_dir", "train_file", "prompt"))
    return None if known is None or known.hub is None or local else [known.hub.id]


def _settings(log: trajectory.Log) -> dict[str, Any]:
    """Return what the log says of the run, without the owner's paths."""
    header, first = log.header, log.segments[0].header
    found: dict[str, Any] = {"steps": len(log.steps)}
    if log.start:
        found["first step"] = log.start
    for name in ("seed", "distribution", "perturbation", "rounding"):
        found[name] = header[name]
    if len(log.steps):
        last = log.steps[len(log.steps) - 1]
        found |= {"directions a step": len(last.record.projected_grads)}
        found |= {"eps, first": first["eps"], "eps, last": last.eps}
        found |= {"learning rate, first": log.steps[0].lrs, "learning rate, last": last.lrs}
        found |= {"weight decay": last.weight_decays}
        if math.isfinite(last.record.loss):
            found["training loss of the last step"] = round(last.record.loss, 4)
    weights = sum(math.prod(entry["shape"]) for entry in header["tensors"])
    found |= {"trained weights": weights}
    for name, value in header["config"].items():
        shown = isinstance(value, str | int | float | list) and value not in ("", [])
        if shown and not name.endswith(_LOCAL):
            found[f"config: {name}"] = value
    return found


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_code, row))} |" for row in rows)])


def _code(value: Any) -> str:
    """Return a value as code that can neither end its cell nor begin Markdown or
    HTML of its own."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.replace("`", "'").replace("|", "\\|").split())
    return f"`{text[:200]}`" if text else ""
