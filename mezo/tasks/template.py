"""Templates: text with columns in braces, `{sentence} It was`, and how a value is written there.

{column}          the value, without the white space around it
{column:how}      the value as one of HOW writes it: "{hypothesis:lower_first}"
{{  }}            braces
"""

from collections.abc import Callable, Mapping
from string import Formatter

from mezo.errors import InputError


def _continued(text: str) -> str:
    """Return the text as the rest of a sentence: its first word in lower case, unless it is I."""
    first, space, rest = text.partition(" ")
    return text if first == "I" else first.lower() + space + rest


def _asked(text: str) -> str:
    """Return the text as a question, with a capital and a question mark."""
    return text[:1].upper() + text[1:] + ("" if text.endswith("?") else "?")


HOW: dict[str, Callable[[str], str]] = {
    "": str.strip,
    "whole": str,  # with the white space around it
    "listed": lambda text: text.replace("@highlight\n", "- "),  # ReCoRD's highlights
    "lower": lambda text: text.strip().lower(),
    "lower_first": lambda text: text.strip()[:1].lower() + text.strip()[1:],
    "but_last": lambda text: text.strip()[:-1],  # without the last character, usually a full stop
    "unstopped": lambda text: text.strip().removesuffix("."),
    "continued": lambda text: _continued(text.strip()),
    "asked": lambda text: _asked(text.strip()),
}


def fields_of(template: str) -> list[str]:
    """Return the column names in a template, in order. Raise InputError for unbalanced braces."""
    return [name for _, name, _ in _parse(template) if name is not None]


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Return the template with its fields filled in, without white space around a value.

    >>> fill("{sentence} It was", {"sentence": "a charming journey . "})
    'a charming journey . It was'
    >>> fill("{question:asked}", {"question": "is it"})
    'Is it?'
    """
    parts = []
    for literal, name, how in _parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(HOW[how](fields[name]))
    return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None, str]]:
    """Return (literal text, the column after it or None, how its value is written) of each part."""
    try:
        parts = [(text, name, how or "") for text, name, how, _ in Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write {{{{ for a brace") from None
    for _, name, how in parts:
        if how not in HOW:
            known = ", ".join(filter(None, HOW))
            raise InputError(
                f"template {template!r}: {how!r} after the colon of {{{name}}} is not one of "
                f"{known}"
            )
    return parts
