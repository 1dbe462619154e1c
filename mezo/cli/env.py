"""The command `mezo env`: what a report of a fault has to say of the machine and its packages."""

from typing import Any

from mezo.cli.parsing import JSON, Parser, print_result


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo env",
        description="Print versions, device, threads and kernels, for a report.",
    )
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo.runs.result import environment, packages

    found: dict[str, Any] = environment() | packages() | {"noise": _noise()}
    print_result(found, own.json)


def _noise() -> str:
    """Name the kernels that draw the directions here."""
    import torch

    from mezo import noise

    kernels = "cpu: numba"
    if torch.cuda.is_available():
        from importlib.util import find_spec

        kernels += "; cuda: " + ("triton" if find_spec("triton") else "torch, slow: no triton")
    return f"contract {noise.CONTRACT}, {kernels}"
