"""`VLLMEngine`: an `Engine` over vLLM in this process.

vLLM is imported when an engine is made, never with this module: it is an environment of its own (docs/vllm.md).
"""

from __future__ import annotations

import gc
import itertools
import secrets
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl.recipe_io import RecipeError
from rl.rollout.engine import RestartNeeded
from rl.rollout.sampling import stream_key
from rl.rollout.types import Sample, SamplingParams
from rl.rollout.vllm_arguments import (
    engine_arguments,
    engine_config,
    folder_stop_ids,
    may_start_empty,
    set_environment,
    why_fixed,
)
from rl.rollout.vllm_routing import expert_layers, of_expert_layers
from rl.rollout.vllm_weights import checked, checkpoint_shapes, spooled, unread

COLDEST, HOTTEST = 0.01, 2.0  # vLLM raises lower temperatures to 0.01 by itself and refuses higher ones
EMPTY = "the engine was started empty: send all weights first"
FIRST = -1  # vLLM's priority of what is scored; samples have 0


@dataclass(frozen=True)
class _Request:
    key: str
    prompt: int  # its tokens
    copies: int  # greedy samples of one prompt are all the same, and vLLM refuses to draw more than one


class VLLMEngine:
    """Continuous batching by vLLM; prompts of a group are computed once (prefix caching).

    model_path: folder or hub id. max_model_len: longest prompt and completion together; None = the model's own.
    gpu_memory_utilization: share of the GPU's memory for weights and cache; None = vLLM's default. On CPU it does
        nothing: the cache takes `kv_cache_memory_bytes` (a field of `extra`), 1 GiB by default.
    max_slots: sequences decoded at a time; None = vLLM's default.
    stop_token_ids: end a completion; None = the EOS tokens of the model's generation config and tokenizer.
    sleeping: on a GPU, let `sleep` give memory back.
    empty: start with random weights, and sample only after an update of all of them. A weight that updates do not reach
        is then plainly wrong and not just a little old, and the first probe sees it. The folder's weights are loaded
        nevertheless where vLLM cannot take others (RestartNeeded), and where `may_start_empty` says so.
    record_routing: note the experts that tokens meet, if vLLM can; a warning if not.
    extra: further engine arguments by vLLM's names; they win over those above.

    Sample j of a request uses vLLM's random stream of seed key(params.seed, stream) + j. Its numbers do not depend on
    other requests; logits do by rounding, wherever vLLM's kernels depend on what else is in the batch.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        max_slots: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        stop_token_ids: Sequence[int] | None = None,
        seed: int = 0,
        version: int = 0,
        sleeping: bool = False,
        empty: bool = False,
        record_routing: bool = False,
        extra: dict[str, Any] | None = None,
    ):
        set_environment()
        try:
            import vllm
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine
            from vllm.v1.executor.uniproc_executor import UniProcExecutor
        except ImportError as error:
            raise RecipeError(
                f"engine vllm: vLLM cannot be imported here ({error}): install it into an environment of its own and "
                f"give that one's interpreter (docs/vllm.md), or use engine: local"
            ) from error
        self._vllm = vllm
        self._on_cpu = current_platform.is_cpu()
        given = {"model": model_path, "dtype": dtype, "seed": seed, "tensor_parallel_size": tensor_parallel_size}
        optional = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_slots,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        given |= {name: value for name, value in optional.items() if value is not None}
        arguments = engine_arguments(given, extra or {}, on_cpu=self._on_cpu, sleeping=sleeping)
        all_config, recording = engine_config(arguments, record_routing=record_routing)
        config = all_config.model_config
        self._fixed = why_fixed(config) if self._on_cpu else None
        self.takes_weights_midway = self._fixed is None
        self._expert_layers = expert_layers(config.hf_text_config) if recording else None
        empty = empty and self._fixed is None and may_start_empty(config, arguments)
        if empty:
            all_config.load_config.load_format = "dummy"
        self._grouped = torch.distributed.is_initialized()
        set_threads = torch.set_num_threads
        self._engine: Any = LLMEngine.from_vllm_config(all_config, disable_log_stats=arguments["disable_log_stats"])
        torch.set_num_threads = set_threads  # vLLM's CPU worker puts a function there that does nothing

        self.max_model_len: int = config.max_model_len
        self.vocabulary: int = config.get_vocab_size()
        stops = folder_stop_ids(model_path) if stop_token_ids is None else stop_token_ids
        self.stop_ids = tuple(sorted({token for token in stops if token < self.vocabulary}))
        self._asleep = False
        self._sleeping = sleeping and not self._on_cpu
        self._in_process = isinstance(self._engine.model_executor, UniProcExecutor)
        self._tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        self._shapes = checkpoint_shapes(model_path)
        self._unread = unread(self._shapes, config.hf_text_config.num_hidden_layers)
        self._fused = self._engine.collective_rpc("r1forge_fused")[0]
        self._broken = EMPTY if empty else None
        self._numbers = itertools.count()
        self._requests: dict[str, _Request] = {}  # by vLLM's request id
        self._ready: list[tuple[str, list[Sample]]] = []  # finished while something else was waited for
        self.version = version

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self._engine.set_weight_version(str(version))  # which vLLM notes with every token

    # ---- sampling -------------------------------------------------------------------------------------

    def submit(self, key: str, prompt: Sequence[int], params: SamplingParams, stream: int) -> None:
        self._usable()
        if any(request.key == key for request in self._requests.values()):
            raise ValueError(f"a request with key {key!r} is being sampled")
        self._check_tokens("the prompt", prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the engine's "
                f"max_model_len of {self.max_model_len}"
            )
        if params.temperature and not COLDEST <= params.temperature <= HOTTEST:
            raise ValueError(f"vLLM samples at temperatures of {COLDEST} to {HOTTEST} or 0, not {params.temperature}")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        greedy = params.temperature == 0
        asked = self._vllm.SamplingParams(
            n=1 if greedy else params.n,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop_token_ids=sorted({*self.stop_ids, *params.stop_token_ids}),
            ignore_eos=True,  # all stop tokens are in the line above
            seed=stream_key(seed, stream) >> 2,  # sample j gets this + j, which must fit 63 bits
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final(),
        )
        self._add(_Request(key, len(prompt), params.n if greedy else 1), prompt, asked)

    def step(self) -> list[tuple[str, list[Sample]]]:
        self._usable()
        groups, self._ready = self._ready, []
        if self._engine.has_unfinished_requests():
            groups += [self._group(output) for output in self._engine.step()]
        return groups

    def abort(self, key: str) -> None:
        ids = [number for number, request in self._requests.items() if request.key == key]
        if ids:
            self._engine.abort_request(ids)
        for number in ids:
            del self._requests[number]
        self._ready = [group for group in self._ready if group[0] != key]

    def idle(self) -> bool:
        return not self._requests and not self._ready

    def score(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        self._usable()
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False, output_kind=self._final()
        )
        for place, sequence in enumerate(tokens):
            self._check_tokens(f"sequence {place}", sequence)
            if len(sequence) >= self.max_model_len:
                raise ValueError(f"sequence {place} of {len(sequence)} tokens: max_model_len is {self.max_model_len}")
        if self._requests:  # they may fill every slot for long: back into the queue, of which scores come first
            self._engine.reset_prefix_cache(reset_running_requests=True)
        waiting = {self._enter(sequence, params, FIRST): place for place, sequence in enumerate(tokens)}
        scores: list[list[float]] = [[] for _ in tokens]
        while waiting:
            for output in self._engine.step():
                if output.request_id not in waiting:
                    self._ready.append(self._group(output))
                    continue
                place = waiting.pop(output.request_id)
                positions = zip(tokens[place][1:], output.prompt_logprobs[1:], strict=True)
                scores[place] = [known[token].logprob for token, known in positions]
        return scores

    # ---- weights --------------------------------------------------------------------------------------

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Whole layers, each tensor unchanged in memory until this returns; what is being sampled goes on with the
        new weights, its keys and values computed anew.

        RestartNeeded: vLLM cannot do it for this model. Another error leaves the engine without valid weights: it
        refuses to work until an update of the whole model went through.
        """
        self._wake()
        if self._fixed:
            raise RestartNeeded(self._fixed)
        pairs = iter(named_tensors)
        first = next(pairs, None)
        if first is not None:
            whole = self._broken is not None
            stream = checked(
                itertools.chain([first], pairs), self._shapes, self._fused,
                tied=self._tied, whole=whole, unread=self._unread,
            )  # fmt: skip
            # Before the weights change, so that nothing computed with the old ones is used with the new ones.
            self._engine.reset_prefix_cache(reset_running_requests=True)
            handed: AbstractContextManager[Any] = nullcontext(stream) if self._in_process else spooled(stream)
            with handed as source:
                self._broken = f"the update to version {version} broke off: send all weights, or restart the engine"
                self._engine.collective_rpc("r1forge_load", args=(source,))
            self._broken = None
        self.version = version

    # ---- memory ---------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Gives the GPU's memory to the trainer until the next call; weights wait in the host's memory."""
        if self._sleeping and not self._asleep:
            if not self.idle():
                raise RuntimeError("the engine is sampling")
            self._engine.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        if self._engine is None:
            return
        client, self._engine = self._engine.engine_core, None
        if self._grouped:
            # vLLM's own way of closing would end torch's process group, which is the trainer's.
            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
        else:
            client.shutdown()
        gc.collect()

    # ---- within ---------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)
        self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def _final(self) -> Any:
        return self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY

    def _check_tokens(self, what: str, tokens: Sequence[int]) -> None:
        if what != "stop_token_ids" and not len(tokens):
            raise ValueError(f"{what} is empty")
        outside = [token for token in tokens if not 0 <= token < self.vocabulary]
        if outside:
            raise ValueError(f"{what}: token {outside[0]} is outside the model's vocabulary of {self.vocabulary}")

    def _add(self, request: _Request, prompt: Sequence[int], params: Any) -> None:
        self._requests[self._enter(prompt, params)] = request

    def _enter(self, prompt: Sequence[int], params: Any, priority: int = 0) -> str:
        number, tokens = str(next(self._numbers)), {"type": "token", "prompt_token_ids": list(prompt)}
        try:
            self._engine.add_request(number, tokens, params, priority=priority)
        except self._vllm.exceptions.VLLMClientError as error:
            raise ValueError(str(error)) from error
        return number

    def _group(self, output: Any) -> tuple[str, list[Sample]]:
        request = self._requests.pop(output.request_id)
        samples = [self._sample(completion, request.prompt) for completion in output.outputs]
        return request.key, samples * request.copies

    def _sample(self, completion: Any, prompt: int) -> Sample:
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {completion.finish_reason!r}")
        spans = completion.weight_versions
        oldest, newest = (int(spans[0].version), int(spans[-1].version)) if spans else (self.version, self.version)
        tokens, layers, routed = list(completion.token_ids), self._expert_layers, None
        if layers is not None:
            routed = of_expert_layers(completion.routed_experts, layers, prompt + len(tokens) - 1)
        return Sample(
            tokens,
            list(completion.logprobs.logprobs),
            completion.finish_reason,
            oldest,
            routed,
            None if newest == oldest else newest,
        )
