"""How the help of a command shows its options: their names, what they do, and their defaults."""

from textwrap import wrap
from typing import Any, NamedTuple

from mezo.options.table import FIELDS

_INDENT = "\n" + " " * 38  # of the lines that continue an option's text


class Entry(NamedTuple):
    """An option in a command's help. A text that names its own default needs no `default`."""

    names: str  # with the value: "--seed N"
    text: str
    default: Any = None

    def __str__(self) -> str:
        plain = isinstance(self.default, str | int) and "the default" not in self.text
        lines = wrap(self.text + f"  [{self.default}]" * plain, 62, break_on_hyphens=False)
        return f"  {self.names:<34}  {_INDENT.join(lines)}"


def page(*parts: Entry | str) -> str:
    """Return the end of a command's help: options, and lines between them."""
    return "".join(f"{part}\n" for part in parts)


def of_table(*flags: str) -> list[Entry]:
    """Return options of MeZO's table: those named, or all that it says to show."""
    return [
        Entry(f"--{option.flag} {option.metavar}".rstrip(), option.help, option.flag_default)
        for option in FIELDS
        if option.flag in flags or (option.shown and not flags)
    ]


# ---- options that several commands have

JSON = Entry("--json", "Print the result as one line of JSON.")
EPS = Entry(
    "--mezo_eps EPS",
    "Size of a perturbation; by default 1e-3, or 1e-2 for LoRA and 1e-1 for a prefix.",
)
RATE = Entry(
    "--learning_rate LR",
    "By default it depends on the model's size and on what is trained (docs/methods.md).",
)
BATCH = Entry("--per_device_train_batch_size N", "Number of examples in a batch.", 16)
RESUME = Entry("--resume_from_checkpoint true", "Resume an interrupted run.")
ENGINE_OPTIONS = Entry(
    "--engine_options JSON", "Options of the engine, such as '{\"tensor_parallel_size\": 2}'."
)


def folder(default: str) -> Entry:
    """Return the option of the folder that a command writes."""
    return Entry("--output_dir DIR", "Folder for all that the command writes.", default)


def steps(default: int) -> Entry:
    """Return the option of the length of a run."""
    return Entry("--max_steps N", "Number of steps.", default)
