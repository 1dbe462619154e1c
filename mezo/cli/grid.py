"""`mezo train --grid`: a search from the command line."""

import sys
from contextlib import redirect_stdout

from mezo.cli.main import _print, _say
from mezo.compare import grids


def main(own, options: list[str], model, data, args) -> None:
    """Search over the grid `own.grid`; `options` are the words given, which win over the grid."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in options}
    with redirect_stdout(sys.stderr):
        found = grids.search(
            *(model, data, args, own.grid),
            given=given,
            on_cell=lambda name, what: _say(f"{what}: {name}"),
        )
    metric = found["metric"]
    shown = {"best": found["best"], "dev": found["dev"], metric: found["test"][metric]}
    shown |= {"cells": len(found["cells"]), "output_dir": args.output_dir}
    _print(found if own.json else shown, own.json)
    _say(f"all cells: {args.output_dir}/{grids.SUMMARY}")
