"""`mezo train --reward ...`: train on what a function or a program says of generated text.

mezo train --model NAME --train_file prompts.jsonl --reward rules.py:short --output_dir runs/x
mezo train --model NAME --train_file prompts.jsonl --reward "python score.py"
"""

import shlex
from functools import partial

from mezo.cli import entries
from mezo.cli.entries import Entry, page
from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    helped,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.cli.running import carried_out, replay
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import RewardArguments

HELP = page(
    "Training, named as TRL's GRPOConfig and transformers' (--help_all lists every option).",
    entries.folder("runs/reward"),
    Entry("--max_completion_length N", "Longest completion in tokens.", 64),
    Entry("--temperature T", "Temperature of sampling; 0 is greedy decoding.", 1),
    Entry("--stop STRING [STRING ...]", "Strings that end a completion and are cut off."),
    Entry("--reward_weights W [W ...]", "One weight for each reward function."),
    *(entries.RATE, entries.EPS, entries.steps(1000)),
    Entry(
        "--per_device_train_batch_size N",
        "Number of prompts in a step; take more if rewards tie.",
        16,
    ),
    Entry("--eval_steps N", "Number of steps between evaluations.", 100),
    Entry("--save_steps N", "Number of steps between checkpoints.", 100),
    Entry("--num_samples N", "Number of directions in a step; the model writes twice for each.", 1),
    Entry(
        "--scale_rewards group",
        "With several directions: centre and scale the rewards of each prompt, as GRPO does.",
    ),
    Entry("--engine vllm", "Generate with vLLM, which holds the weights (docs/engines.md)."),
    entries.ENGINE_OPTIONS,
    Entry("--stop_forgotten X", "Stop when the loss on --held_out_file has risen by X."),
    Entry("--log_completions", "Write completions to output_dir/completions.jsonl."),
    *entries.of_table("offload"),
    entries.RESUME,
    entries.JSON,
)


def asked(argv: list[str]) -> bool:
    """Return whether the options, or the file of --config, name a reward."""
    return any(word.split("=")[0] == "--reward" for word in with_config(argv))


def train(argv: list[str]) -> None:
    if helped("mezo train --reward", argv, (ModelArguments, RewardArguments), HELP):
        return
    from mezo.runs import reward as reward_run
    from mezo.runs.arguments import RewardTrainArguments

    kinds = (ModelArguments, RewardArguments, RewardTrainArguments)
    completed = partial(with_log, kinds=kinds, kind="reward")
    given = options_of("mezo train --reward", argv, kinds, {"json": JSON}, completed)
    model, data, args, own = given
    words = ["mezo", "train", *argv]
    result = carried_out(words, args, lambda tell: reward_run.train(model, data, args, tell))
    if result is None:
        return
    shown = {"reward_before": result["before"]["reward"], "reward": result["after"]["reward"]}
    shown |= {"ties": result["ties"], "steps": result["steps"], "seconds": result["seconds"]}
    print_result(result if own.json else shown | {"output_dir": args.output_dir}, own.json)
    for sample in result["samples"]:
        say(f"  {sample['prompt']!r}")
        for when in ("before", "after"):
            say(f"    {when:<6} {sample[when]!r}")
    say(f"next: {shlex.join(replay(model, args))}")
