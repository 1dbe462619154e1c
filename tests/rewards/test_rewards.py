"""mezo.rewards: reward functions are called as TRL calls them, and their mistakes are named."""

import asyncio
import math

import numpy as np
import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import MeZO, rewards, trajectory
from mezo.errors import InputError
from mezo.objectives.generation import Completion, Generation
from mezo.record import Record
from mezo.rewards import RewardFunctions, Ties

MADE = [Completion((5, 6), "one", True), Completion((7,), "two words", False)]
SAMPLED = Generation(6, temperature=1.0)


def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]


def pair():
    tokenizer = byte_bpe()
    return tiny_model("llama", len(tokenizer)).float(), tokenizer


def test_a_function_gets_what_trl_gives_it():
    """Names and types as GRPOTrainer._calculate_rewards of trl 1.16 passes them."""
    seen = {}

    def f(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids)
        columns["log_extra"]("seen", ["a", "b"])
        columns["log_metric"]("size", 2)
        return [1, None]

    scores = RewardFunctions(f)(["p", "q"], MADE, {"answer": [3, 4]}, trainer_state="state")
    assert seen.pop("log_extra")
    assert seen.pop("log_metric")
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["one", "two words"],
        "ids": [[5, 6], [7]],
        "answer": [3, 4],
        "trainer_state": "state",
    }
    assert scores.per_function == {"f": [1.0, None]}
    assert scores.total == [1.0, None]
    assert scores.mean == 1.0
    assert scores.extra == {"seen": ["a", "b"]}
    assert scores.metrics == {"size": [2.0]}


def test_completions_of_conversations_are_conversations():
    talk = [[{"role": "user", "content": "hello"}]] * 2
    seen = []
    RewardFunctions(lambda completions, **kw: seen.extend(completions) or [0, 0])(talk, MADE)
    assert seen == [[{"role": "assistant", "content": text}] for text in ("one", "two words")]


def test_the_reward_is_the_weighted_sum_of_the_functions_that_gave_one():
    def first(**kwargs):
        return [1.0, None]

    def second(**kwargs):
        return [np.float32(0.5), None]

    scores = RewardFunctions([first, second, lengths], [2.0, 4.0, 0.5])(["p", "q"], MADE)
    assert scores.total == [2.0 + 2.0 + 1.5, 4.5]
    nothing = RewardFunctions(lambda **kw: [None, None])(["p", "q"], MADE)
    assert math.isnan(nothing.mean)


def test_functions_of_one_name_are_told_apart():
    assert RewardFunctions([lengths, lengths]).names == ["lengths", "lengths_2"]


def test_async_functions_run_beside_each_other_in_one_loop():
    """The second waits for the first's event: one after the other they would never end."""
    loops, events = [], {}

    async def waits(**kwargs):
        loops.append(asyncio.get_running_loop())
        events["set"] = asyncio.Event()
        await events["set"].wait()
        return [1.0, 2.0]

    class Sets:
        async def __call__(self, **kwargs):
            while "set" not in events:
                await asyncio.sleep(0)
            events.pop("set").set()
            return [3.0, None]

    functions = RewardFunctions([waits, Sets()])
    assert functions(["p", "q"], MADE).total == [4.0, 2.0]
    assert functions(["p", "q"], MADE).total == [4.0, 2.0]
    assert loops[0] is loops[1]

    async def within():  # as in a notebook
        return functions(["p", "q"], MADE).total

    assert asyncio.run(within()) == [4.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        (None, "returned a NoneType"),
        (0.5, "returned a float"),
        ([0.5, math.nan], "returned nan for completion 1"),
        ([math.inf, 0], "returned inf for completion 0"),
        (["good", 0], "returned 'good', a str"),
        ([torch.tensor([1.0, 2.0]), 0], "a Tensor"),
    ],
)
def test_what_is_no_reward_is_one_error_that_names_the_function(returned, words):
    def judge(**kwargs):
        return returned

    with pytest.raises(InputError, match=rf"^reward function judge.*{words}"):
        RewardFunctions(judge)(["p", "q"], MADE)


def test_scalars_of_numpy_and_torch_are_numbers():
    scores = RewardFunctions(lambda **kw: torch.tensor([1.0, 2.0]))(["p", "q"], MADE)
    assert scores.total == [1.0, 2.0]
    assert RewardFunctions(lambda **kw: np.array([True, False]))(["p", "q"], MADE).total == [1, 0]


def test_a_function_that_takes_too_little_is_told_what_it_gets():
    def strict(completions):
        return [0.0, 0.0]

    with pytest.raises(InputError, match=r"strict: got an unexpected.*let it take \*\*kwargs"):
        RewardFunctions(strict)(["p", "q"], MADE)
    with pytest.raises(InputError, match=r"token_f1: missing a required argument: 'answers'"):
        RewardFunctions(rewards.token_f1)(["p", "q"], MADE)


def test_an_error_within_a_function_is_its_own():
    def broken(**kwargs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        RewardFunctions(broken)(["p", "q"], MADE)


@pytest.mark.parametrize(
    ("functions", "weights", "words"),
    [
        ([], None, "reward_funcs is empty"),
        ([3], None, "must be callable, got 3"),
        ("rules.py:f", None, "is no reward function"),
        (torch.nn.Linear(1, 1), None, "the reward model Linear"),
        (lengths, [1.0, 2.0], "2 reward weights for 1 reward functions"),
    ],
)
def test_what_cannot_be_called_is_refused_at_the_door(functions, weights, words):
    with pytest.raises(InputError, match=words):
        RewardFunctions(functions, weights)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="'answer' has 1 values for 2 prompts"):
        RewardFunctions(lengths)(["p", "q"], MADE, {"answer": [1]})
    with pytest.raises(InputError, match="'completions' has the name of an argument"):
        RewardFunctions(lengths)(["p", "q"], MADE, {"completions": [1, 2]})


def test_answers_are_judged_by_squads_metrics():
    answers = [["One", "1"], ["the two"]]
    judge = RewardFunctions([rewards.exact_match, rewards.token_f1])
    scores = judge(["p", "q"], MADE, {"answers": answers})
    assert scores.per_function == {"exact_match": [1.0, 0.0], "token_f1": [1.0, 2 / 3]}


# --- the closure -------------------------------------------------------------------------------


def test_a_run_on_rewards_is_rebuilt_from_its_log_to_the_bit(tmp_path):
    model, tokenizer = pair()
    base, _ = pair()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-2, seed=1)
    ties = Ties()
    optimizer.observers.append(ties)
    prompts = ["the film", "It was", "no wit", "a boring movie"]
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for step in range(4):
            optimizer.step(rewards.closure(model, tokenizer, prompts, lengths, SAMPLED, draw=step))
    assert ties.estimates == 4
    assert ties.ties < 4
    trajectory.replay(tmp_path / "run.mezo", base)
    found = dict(base.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())


def test_both_halves_see_the_same_prompts_and_noise():
    """With eps so small that no token changes, both halves and every call write the same."""
    model, tokenizer = pair()
    seen = []
    closure = rewards.closure(
        model, tokenizer, ["the film", "no"], lengths, SAMPLED, draw=9, on_sample=seen.append
    )
    MeZO(model.named_parameters(), lr=0.0, eps=1e-7, seed=0).step(closure)
    assert len(seen) == 2
    assert seen[0].completions == seen[1].completions
    assert seen[0].loss == -seen[0].scores.mean


@pytest.mark.parametrize("perturbation", ["scratch", "low_rank"])
def test_other_perturbations_reach_the_generation(perturbation):
    """At a large eps the two halves differ; afterwards the weights are what they were."""
    model, tokenizer = pair()
    optimizer = MeZO(model.named_parameters(), lr=0.0, eps=0.5, seed=0, perturbation=perturbation)
    seen, before = [], [p.detach().clone() for p in model.parameters()]
    closure = rewards.closure(
        model, tokenizer, ["the film", "no"], lengths, SAMPLED, on_sample=seen.append
    )
    optimizer.step(closure)
    optimizer.write()
    assert seen[0].completions != seen[1].completions
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_batch_without_any_reward_refuses_the_update(caplog):
    model, tokenizer = pair()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model.named_parameters(), lr=1.0, seed=0)
    closure = rewards.closure(model, tokenizer, ["no"], lambda **kw: [None], SAMPLED)
    optimizer.step(closure)
    assert "no reward function scored any of 1 completions" in caplog.text
    assert torch.allclose(
        torch.cat([p.flatten() for p in before]),
        torch.cat([p.detach().flatten() for p in model.parameters()]),
        atol=1e-6,
    )


def test_conversations_go_through_the_chat_template():
    model, tokenizer = pair()
    talk = [[{"role": "user", "content": "the film"}]]
    with pytest.raises(InputError, match="no chat template"):
        rewards.sample(model, tokenizer, talk, lengths, SAMPLED)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} It was{% endif %}"
    )
    ids = tokenizer("the film It was", add_special_tokens=False)["input_ids"]
    judge = RewardFunctions(lambda completions, **kw: [len(completions[0][0]["content"])])
    found = rewards.sample(model, tokenizer, talk, judge, SAMPLED)
    plain = rewards.sample(model, tokenizer, ["x"], lengths, SAMPLED)
    assert found.completions != plain.completions
    from mezo.objectives.generation import generate

    assert found.completions == generate(model, tokenizer, [ids], SAMPLED)
    with pytest.raises(InputError, match="all texts or all conversations"):
        rewards.sample(model, tokenizer, ["x", talk[0]], lengths, SAMPLED)


def test_ties_are_counted():
    ties = Ties()
    for step in range(30):
        ties(Record(step, (0.0 if step % 3 else 1.0,), 0.0, (1,)))
    assert (ties.ties, ties.estimates) == (20, 30)


def test_the_mean_does_not_depend_on_the_order_of_rewards():
    """Or equal rewards of two halves, permuted, would be no tie."""
    values = [0.1, 0.2, 0.3, 0.7, 1e-9]
    scores = [rewards.Scores({}, order).mean for order in (values, values[::-1])]
    assert scores[0] == scores[1]


# --- names -----------------------------------------------------------------------------------


def test_a_reward_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "own.py").write_text("def short(**kwargs): return []\nLIMIT = 3\n")
    monkeypatch.chdir(tmp_path)
    assert rewards.resolve("rules/own.py:short").__name__ == "short"
    assert rewards.resolve("rules.own:short").__name__ == "short"
    assert rewards.resolve("mezo.rewards:token_f1") is rewards.token_f1
    assert rewards.resolve("python score.py").words == ["python", "score.py"]
    for name, words in (
        ("rules/own.py:long", "has no long"),
        ("rules/own.py:LIMIT", "is a int, no function"),
        ("rules/none.py:f", "file not found"),
        ("no_such_module.x:f", "no such module"),
    ):
        with pytest.raises(InputError, match=words):
            rewards.resolve(name)
