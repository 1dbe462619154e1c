"""What an option is: its name, its values, and where it matters."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mezo.errors import InputError
from mezo.options.domains import ANY, Domain


class Resume(Enum):
    """What happens if a run is resumed with another value."""

    REFUSED = "it would be another run"
    HONOURED = "the new value applies from the resumed step on, and a warning names it"
    FREE = "the option does not affect the weights"


class Logged(Enum):
    """Where the run log keeps an option."""

    NO = "a replay does not depend on it"
    ONCE = "in the header of the log, and it must stay constant"
    UNLESS_DEFAULT = "the same, but it is left out at its default"
    EVERY_STEP = "in the header of each segment: it may change from step to step"


class Source(Enum):
    """Which Trainer's configs have a field for an option."""

    OURS = "MeZOConfig declares it"
    THEIRS = "transformers' TrainingArguments declares it"
    NONE = "there is no field"


@dataclass(frozen=True)
class Key:
    """A key of the log's header that an option fills, with the values that a reader accepts."""

    name: str
    domain: Domain


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Its name as an argument of `MeZO`; for an option of trainers alone, its field's name.
        default: Its default as an argument of `MeZO`.
        help: Whole sentences for `--help`; they name the default only if it is not plain.
        domain: The values that it may have.
        kind: The type of its field, from which the command line parses it.
        metavar: What stands for its value in `--help`.
        argument: Whether it is an argument of `MeZO`; if not, trainers alone have it.
        of_group: Whether each parameter group may have its own value.
        only_for: Another option and the value of it for which alone this one has a meaning.
        logged: Where the run log keeps it.
        keys: The keys of the log's header that it fills, if they are not its name alone.
        resume: What happens if a run is resumed with another value.
        source: Which config has a field for it.
        field: The name of the field, if it is not `name`.
        field_default: The default of the field, if it is not `default`.
        shown: Whether `mezo train --help` shows it; `--help_all` shows all.
    """

    name: str
    default: Any
    help: str
    domain: Domain = ANY
    kind: Any = str
    metavar: str = ""
    argument: bool = True
    of_group: bool = False
    only_for: tuple[str, Any] | None = None
    logged: Logged = Logged.NO
    keys: tuple[Key, ...] = ()
    resume: Resume = Resume.REFUSED
    source: Source = Source.OURS
    field: str = ""
    field_default: Any = ...
    shown: bool = False

    @property
    def flag(self) -> str:
        """The name of its field in a config, which is its name on the command line."""
        return self.field or self.name

    @property
    def flag_default(self) -> Any:
        return self.default if self.field_default is ... else self.field_default

    @property
    def constant(self) -> bool:
        """Whether it must stay constant during a run that is logged."""
        return self.logged in (Logged.ONCE, Logged.UNLESS_DEFAULT)

    @property
    def header_keys(self) -> tuple[Key, ...]:
        """The keys that it fills in the header of a log."""
        return (self.keys or (Key(self.name, self.domain),)) if self.constant else ()

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the option has a meaning beside these settings."""
        return self.only_for is None or settings[self.only_for[0]] == self.only_for[1]

    def check(self, value: Any) -> None:
        """Raise InputError, naming the option and the value, unless the value is in its domain."""
        if problem := self.domain.problem(self.name, value):
            raise InputError(problem)
