"""What the commands share: parsing options, showing help, and printing to the right stream."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from mezo.cli import entries
from mezo.cli.entries import Entry
from mezo.errors import InputError
from mezo.foreign import read_options
from mezo.runs.data_arguments import DataArguments

JSON: dict[str, Any] = {"action": "store_true", "help": entries.JSON.text}


def nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help lists the options")


def with_config(argv: list[str]) -> list[str]:
    """Return argv preceded by the options in --config FILE, so that the flags take precedence."""
    parser = Parser(prog="mezo", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(argv)
    return argv if found.config is None else _options_in(found.config) + rest


def _options_in(path: str) -> list[str]:
    return words_of(read_options(path, path, "lines 'option: value'"))


def named_in(words: Iterable[str]) -> set[str]:
    """Return the names of the options among the words of a command."""
    return {word.split("=")[0].lstrip("-").replace("-", "_") for word in words}


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return the command-line words for these options; None and [] are left out."""
    words = []
    for name, value in options.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value is True:
            words += [f"--{name}"]
        elif value is not None and value != []:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{name}={text}"]
    return words


def parse(argv: list[str], parser, kinds: tuple) -> tuple:
    """Return instances of the dataclasses `kinds`, followed by the parser's other options.

    Raises InputError for a bad value or an unknown option, with the nearest known one.
    """
    namespace, left = parser.parse_known_args(argv)
    if left:
        _refuse(left[0].split("=")[0], parser, kinds)
    try:
        found = parser.parse_dict(vars(namespace), allow_extra_keys=True)
    except (ValueError, ImportError) as error:  # from transformers' checks
        raise InputError(str(error)) from None
    return (*found, namespace)


def _refuse(word: str, parser, kinds: tuple) -> None:
    if not word.startswith("-"):
        raise InputError(f"unexpected argument {word!r}: options begin with --")
    names = [name for kind in kinds for f in fields(kind) for name in _names(f)]
    own = [name for action in parser.own for name in action.option_strings]
    known = [name.lstrip("-") for name in (*names, *own)]
    near = get_close_matches(word.lstrip("-"), known, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"{parser.prog} --help lists them"
    raise InputError(f"unknown option {word}; {hint}")


def _names(f) -> list[str]:
    return [*f.metadata.get("aliases", []), f"--{f.name}"]


def hf_parser(prog: str, kinds: tuple, **own):
    from transformers import HfArgumentParser

    class Options(Parser, HfArgumentParser):
        pass

    both = "resolve"  # an option in two dataclasses, such as trust_remote_code, sets both
    parser: Any = Options(kinds, prog=prog, allow_abbrev=False, conflict_handler=both)
    parser.own = []
    for name, settings in own.items():
        names = {f"--{name}": None, f"--{name.replace('_', '-')}": None}  # as HfArgumentParser does
        parser.own.append(parser.add_argument(*names, **settings))
    return parser


def options_of(
    prog: str,
    argv: list[str],
    kinds: tuple,
    own: Mapping[str, Any],
    complete: Callable[[list[str]], list[str]] = list,
) -> tuple:
    """Return the options of a command: instances of the dataclasses `kinds`, and a namespace.

    Args:
        prog: The command, as messages name it.
        argv: Its words.
        kinds: The dataclasses of its options.
        own: The command's further options, as arguments of argparse's `add_argument`.
        complete: Adds words to those of `argv` and of --config, whose options take precedence.

    Prints every option, and exits, if --help_all is among the words. Raises InputError for a bad
    value or an unknown option.
    """
    parser = hf_parser(prog, kinds, **own)
    if "--help_all" in argv:
        parser.print_help()
        parser.exit()
    return parse(complete(with_config(argv)), parser, kinds)


def helped(prog: str, argv: list[str], kinds: tuple, tail: str = "") -> bool:
    """Show a command's help, and return True, if it is asked for; otherwise silence the libraries.

    Help comes from the dataclasses alone: it is quick, since transformers is not imported.
    """
    if not {"-h", "--help"} & set(argv):
        quiet()
        return False
    print(f"usage: {prog} [options] [--config FILE.yaml]\n")
    for kind in kinds:
        print(f"{kind.__doc__}")
        for f in fields(kind):
            print(Entry(", ".join(_names(f)), f.metadata["help"], f.default))
        print()
    print(tail.lstrip("\n"), end="")
    return True


def quiet() -> None:
    """Silence what other packages say of themselves; the process belongs to the command.

    Call it before what imports them. What fails in them still reaches the user, as one line.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # and then raises
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
        return
    for name, value in result.items():
        if value is not None and not isinstance(value, dict):
            print(f"{name}\t{value:.4g}" if isinstance(value, float) else f"{name}\t{value}")


def default_output_dir(argv: list[str]) -> list[str]:
    """Return the option --output_dir=runs/<task>; a later one in argv takes precedence."""
    parser = Parser(prog="mezo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default=DataArguments.task)
    parser.add_argument("--prompt", dest="own")
    found, _ = parser.parse_known_args(argv)
    return [f"--output_dir=runs/{found.task if found.own is None else 'custom'}"]
