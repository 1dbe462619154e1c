"""The command `mezo tasks`: list the tasks, or show one of them on a real row."""

import json

from mezo import tasks
from mezo.cli.parsing import JSON, Parser, say


def show(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo tasks",
        description="List the tasks. With a name, show what one row of that task becomes for each "
        "kind of model: '|' begins the part that is scored or trained, and '*' marks the right "
        "answer.",
    )
    parser.add_argument("name", nargs="?", help="Name of a task.")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    if own.name is not None:
        task = tasks.get(own.name)
        (row,) = (row for row in tasks.describe() if row["name"] == task.name)
        print(json.dumps(row | tasks.rendered(own.name)) if own.json else tasks.show(own.name))
        return
    rows = tasks.describe()
    if own.json:
        print(json.dumps(rows))
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    say("next: mezo tasks sst2")
