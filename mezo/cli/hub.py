"""The commands `mezo push` and `mezo pull`: share run logs on the Hugging Face hub."""

import shlex

from mezo.cli.parsing import JSON, Parser, print_result, say


def push(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo push",
        description="Share a run log on the Hugging Face hub, with a model card made from it. The "
        "log contains the run's config, which `mezo log FILE` shows. Log in first: hf auth login.",
    )
    parser.add_argument("--log", required=True, help="The run log.")
    parser.add_argument(
        "--repo",
        required=True,
        help="The repository, as user/name; it is created if it does not exist.",
    )
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument(
        "--base_model", "--base-model", help="Name of the base model on the hub, for the card."
    )
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo.hub import repository as hub

    _no_bars()
    result = hub.push(own.log, own.repo, private=own.private, base_model=own.base_model)
    print_result(result, own.json)
    if result["base_model"] is None:
        say("the card names no base model; give it with --base_model NAME")
    say(f"next: mezo pull {own.repo}")


def pull(argv: list[str]) -> None:
    parser = Parser(prog="mezo pull", description="Download a run log from the Hugging Face hub.")
    parser.add_argument("repo", help="The repository, as user/name.")
    parser.add_argument("--output", help="File to write; by default name.mezo.")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo.hub import repository as hub

    _no_bars()
    path = str(hub.pull(own.repo, own.output or f"{own.repo.split('/')[-1]}.mezo"))
    print_result({"log": path}, own.json)
    say(f"next: mezo replay --model ... --log {shlex.quote(path)} --output_dir tuned")


def _no_bars() -> None:
    """Disable progress bars, which a few KB do not need; the process belongs to the command."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
