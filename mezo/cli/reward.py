"""`mezo train --reward ...`: train on what a function or a program says of generated text.

mezo train --model NAME --train_file prompts.jsonl --reward rules.py:short --output_dir runs/x
mezo train --model NAME --train_file prompts.jsonl --reward "python score.py"
"""

import shlex
from functools import partial

from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    entries_of,
    helped,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.cli.running import carried_out, replay
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import RewardArguments

HELP = """
training, named as TRL's GRPOConfig and transformers' TrainingArguments (--help_all lists them):
  --output_dir DIR                    default runs/reward
  --max_completion_length N           default 64 tokens
  --temperature T                     default 1; 0 is greedy
  --stop STRING [STRING ...]          strings that end a completion and are cut off
  --reward_weights W [W ...]          one weight per reward function
  --learning_rate LR  --mezo_eps EPS  default: by the model's size and by what is trained
  --max_steps N                       default 1000
  --per_device_train_batch_size N     prompts per step; default 16; use more if rewards tie
  --eval_steps N  --save_steps N      default 100
  --num_samples N                     directions a step; each generates twice
  --scale_rewards group               with several directions: rewards are centred and scaled
                                      prompt by prompt, as GRPO does
  --engine vllm                       generate with vLLM, which holds the weights (docs/engines.md)
  --engine_options JSON               options of the engine, such as '{"tensor_parallel_size": 2}'
  --stop_forgotten X                  stop when the loss on --held_out_file has risen by X
  --log_completions                   write completions to output_dir/completions.jsonl
{offload}
  --resume_from_checkpoint true       resume an interrupted run
  --json                              print the result as one line of JSON
""".replace("{offload}", entries_of("offload"))


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
