"""The command `mezo demo`: fine-tune a small model offline, and compare MeZO with Adam."""

from mezo.cli.parsing import JSON, Parser, quiet


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo demo",
        description="Fine-tune a small model offline, and compare MeZO with Adam.",
    )
    parser.add_argument(
        "--model",
        default="causal-lm",
        help="causal-lm, a small language model (the default), or minilm, a sentence encoder.",
    )
    parser.add_argument("--output_dir", default="demo_output", help="Folder for the report.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of data and directions.")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    quiet()
    from mezo.demo import demo

    demo.main(own.output_dir, seed=own.seed, as_json=own.json, model=own.model)
