"""What a Trainer's model card says of a run of MeZO, which transformers' card takes for AdamW."""

import re
import shlex
from pathlib import Path
from typing import Any

from mezo.options.table import FIELDS

TAGS = ("mezo", "zeroth-order")
_SHOWN = ("rule", "estimator", "mezo_eps", "num_samples", "distribution")
_OPTIMIZER = re.compile(r"^- optimizer: [^\n]*(?:\n(?!- |\n)[^\n]*)*", re.MULTILINE)
SECTION = """
## MeZO

This model was fine-tuned with forward passes alone, by MeZO
([arXiv:2305.17333](https://arxiv.org/abs/2305.17333)): {optimizer}. No gradient was computed, and
`--optim` and the options of AdamW had no effect.

`run.mezo` is the log of the run. It rebuilds the weights from those of the base model, to the bit
and without data:

```sh
{command}
```
"""


def complete(path: Path, trainer: Any) -> None:
    """Put MeZO into the card at `path`, which the Trainer has just written.

    The tags gain `mezo`, the line about the optimizer names MeZO, and a section at the end says how
    the run log rebuilds the model. The rest of the card stays.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    optimizer = described(trainer.args)
    text = _OPTIMIZER.sub(lambda _: f"- optimizer: MeZO, {optimizer}", card.text)
    card.text = text.rstrip() + "\n" + SECTION.format(optimizer=optimizer, command=_replay(trainer))
    card.save(path)


def described(args: Any) -> str:
    """Return MeZO's own settings in a phrase; those of `MeZO` where the arguments have none."""
    shown = [option for option in FIELDS if option.flag in _SHOWN]
    given = {option.flag: getattr(args, option.flag, option.flag_default) for option in shown}
    return ", ".join(f"{name}={given[name]}" for name in _SHOWN)


def _replay(trainer: Any) -> str:
    """Return the command that makes the weights beside the card: the best, where they are kept."""
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    base = getattr(config, "_name_or_path", "") or "BASE_MODEL"
    base = "BASE_MODEL" if Path(base).exists() else base  # a folder of the owner's
    words = ["mezo", "replay", "--model", base, "--log", "run.mezo", "--output_dir", "tuned"]
    best, last = trainer.state.best_global_step, trainer.state.global_step
    if trainer.args.load_best_model_at_end and best and best != last:
        words += ["--until", str(best)]
    return shlex.join(words)
