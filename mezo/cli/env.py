"""The command `mezo env`: what a report of a fault has to say of the machine and its packages."""

from importlib.metadata import PackageNotFoundError, version
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
    from mezo import noise

    return f"contract {noise.CONTRACT}, cpu: numba; cuda: {_cuda()}"


def _cuda() -> str:
    """Return what draws on a CUDA device, or why there is none: a broken driver has to be named."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "none, torch is built without it"
    try:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return f"fails, {str(error).splitlines()[0]}"
    if not names:
        return f"no device found by torch for CUDA {torch.version.cuda}"
    try:
        kernels = f"triton {version('triton')}"
    except PackageNotFoundError:
        kernels = "torch, slow: triton is not installed"
    return f"{kernels}, CUDA {torch.version.cuda}, {len(names)} x {', '.join(dict.fromkeys(names))}"
