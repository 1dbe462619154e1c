"""`mezo train --grid`: a search from the command line."""

import sys
from contextlib import redirect_stdout

from mezo.cli.parsing import print_result, say
from mezo.compare import grids


def main(own, options: list[str], model, data, args) -> None:
    """Search over the grid `own.grid`; `options` are the words given, which win over the grid."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in options}
    with redirect_stdout(sys.stderr):
        found = grids.search(
            *(model, data, args, own.grid),
            given=given,
            on_cell=lambda name, what: say(f"{what}: {name}"),
        )
    metric = found["metric"]
    shown = {"best": found["best"], "dev": found["dev"], metric: found["test"][metric]}
    shown |= {"cells": len(found["cells"]), "output_dir": args.output_dir}
    print_result(found if own.json else shown, own.json)
    say(f"all cells: {args.output_dir}/{grids.SUMMARY}")
