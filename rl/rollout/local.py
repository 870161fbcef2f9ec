"""`LocalSampler`: in-process sampling with continuous batching over preallocated key/value slots.

One loop: admit prompts while rows are free (each prompt is prefilled once, its keys and values copied to a
row per sample), decode one token for every running row, retire finished rows by moving the last one there.
"""

from __future__ import annotations

import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl.policy.attention import PackedLayout, Segment, packed_attention
from rl.policy.load import SUPPORTED_TYPES, stop_token_ids
from rl.rollout.decode import DecodeStep
from rl.rollout.fallback import generate_with_transformers
from rl.rollout.prepacked import prepacked
from rl.rollout.sampling import choose, stream_key, uniform
from rl.rollout.slots import Slots
from rl.rollout.types import Sample, SamplingParams


@dataclass
class _Prompt:
    """A prefilled prompt whose samples are not all admitted yet."""

    index: int
    ids: Sequence[int]
    start: int  # where it stands in the prefilled pack
    recorded: dict[int, tuple[Tensor, Tensor]]
    logits_V: Tensor
    next_sample: int = 0


@dataclass
class _Running:
    """A sequence being decoded; its row in the slots is its place in the list of running ones."""

    prompt: int
    sample: int
    key: int
    length: int  # tokens whose keys are in the slot
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalSampler:
    """Samples from a Hugging Face causal LM in this process; the weights are the model's own tensors.

    max_slots: sequences decoded at a time. prefill_tokens: prompt tokens per prefill forward.
    slots: whether to drive the model's attention ourselves; None = if its type is known to allow it.
    Architectures whose attention we cannot drive fall back to transformers' `generate`, announced once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_slots: int = 64,
        prefill_tokens: int = 8192,
        version: int = 0,
        progress: Callable[[int, int], None] | None = None,
        slots: bool | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.version = version
        self.progress = progress  # called with (completions done, completions asked for)
        self.stop_ids = stop_token_ids(model, tokenizer)
        self.supported = model.config.model_type in SUPPORTED_TYPES if slots is None else slots
        self._slots: Slots | None = None
        self._step: DecodeStep | None = None
        if not self.supported:
            warnings.warn(
                f"no slot decoding for model type {model.config.model_type!r}: using transformers' generate",
                stacklevel=2,
            )

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies tensors into the model in place; unknown names or other shapes are an error."""
        parameters = dict(self.model.state_dict(keep_vars=True))
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in parameters:
                    raise KeyError(f"the sampler's model has no weight named {name!r}")
                if parameters[name].shape != tensor.shape:
                    raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}")
                parameters[name].copy_(tensor)
        self.version = version

    def release(self) -> None:
        """Gives the slots' memory back (before training on the same device)."""
        self._slots, self._step = None, None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        if any(len(p) == 0 for p in prompts):
            raise ValueError(f"prompt {next(i for i, p in enumerate(prompts) if not len(p))} is empty")
        if streams is not None and len(streams) != len(prompts):
            raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        keys = [stream_key(seed, s) for s in (streams if streams is not None else range(len(prompts)))]
        stops = frozenset({*self.stop_ids, *params.stop_token_ids})
        with evaluating(self.model):
            if not self.supported:
                return generate_with_transformers(
                    self.model, prompts, params, keys, stops, self.version, self.max_slots
                )
            rows = min(self.max_slots, len(prompts) * params.n)
            with packed_attention(self.model), prepacked(self.model, rows):
                return self._generate(prompts, params, keys, stops)

    def _generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, keys: list[int], stops: frozenset[int]
    ) -> list[list[Sample]]:
        total = len(prompts) * params.n
        done: list[list[Sample | None]] = [[None] * params.n for _ in prompts]
        capacity = max((len(p) for p in prompts), default=0) + params.max_tokens
        slots, step = self._buffers(min(self.max_slots, total), capacity)
        # Longest prompts first: short ones fill the gaps that finished sequences leave at the end.
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
        ready: deque[_Prompt] = deque()
        running: list[_Running] = []
        finished = 0

        def settle(rows: list[_Running], tokens: list[int], logps: list[float]) -> list[_Running]:
            """Appends the drawn tokens; returns the sequences that ended."""
            nonlocal finished
            ended = []
            for row, token, logp in zip(rows, tokens, logps, strict=True):
                row.token_ids.append(token)
                row.logprobs.append(logp)
                stop = token in stops
                if stop or len(row.token_ids) == params.max_tokens:
                    reason = "stop" if stop else "length"
                    done[row.prompt][row.sample] = Sample(row.token_ids, row.logprobs, reason, self.version)  # type: ignore[arg-type]
                    ended.append(row)
            finished += len(ended)
            if ended and self.progress:
                self.progress(finished, total)
            return ended

        while waiting or ready or running:
            admitted: list[_Running] = []
            first_logits: list[Tensor] = []
            while (waiting or ready) and len(running) + len(admitted) < slots.count:
                used = len(running) + len(admitted)
                if not ready:
                    ready.extend(self._prefill(prompts, waiting, slots.count - used, params.n))
                prompt = ready[0]
                take = min(slots.count - used, params.n - prompt.next_sample)
                slots.fill(list(range(used, used + take)), prompt.recorded, prompt.start, len(prompt.ids))
                for j in range(prompt.next_sample, prompt.next_sample + take):
                    admitted.append(_Running(prompt.index, j, stream_key(keys[prompt.index], j), len(prompt.ids)))
                    first_logits.append(prompt.logits_V)
                prompt.next_sample += take
                if prompt.next_sample == params.n:
                    ready.popleft()
            if admitted:
                ended = settle(admitted, *self._choose(torch.stack(first_logits), admitted, params, stops))
                running += admitted
                self._retire(running, ended, slots)
            if running:
                logits = step([r.token_ids[-1] for r in running], [r.length for r in running])
                for row in running:
                    row.length += 1
                self._retire(running, settle(running, *self._choose(logits, running, params, stops)), slots)
        if step.device.type == "cpu":  # nothing is captured there that would be worth the memory while training
            self.release()
        return done  # type: ignore[return-value]

    def _buffers(self, count: int, capacity: int) -> tuple[Slots, DecodeStep]:
        if self._slots is None or self._slots.count < count or self._slots.capacity < capacity:
            self._slots = Slots(count, capacity, fixed=self.model.device.type == "cuda")
            self._step = DecodeStep(self.model, self._slots)
        assert self._step is not None
        return self._slots, self._step

    def _prefill(self, prompts: Sequence[Sequence[int]], waiting: deque[int], free: int, n: int) -> list[_Prompt]:
        """Runs the next prompts through the model as one pack: as many as have a free row, within budget."""
        chosen: list[int] = []
        segments: list[Segment] = []
        tokens = 0
        while waiting and len(chosen) * n < free:
            length = len(prompts[waiting[0]])
            if chosen and tokens + length > self.prefill_tokens:
                break
            segments.append(Segment(tokens, length))
            chosen.append(waiting.popleft())
            tokens += length
        device = self.model.device
        ids = torch.tensor([t for i in chosen for t in prompts[i]], device=device)
        positions = torch.cat([torch.arange(s.length, device=device) for s in segments])
        recorded: dict[int, tuple[Tensor, Tensor]] = {}
        last = torch.tensor([s.start + s.length - 1 for s in segments], device=device)
        logits = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            layout=PackedLayout(segments, recorded),
            logits_to_keep=last,
        ).logits[0]
        return [
            _Prompt(i, prompts[i], segment.start, recorded, logits[row])
            for row, (i, segment) in enumerate(zip(chosen, segments, strict=True))
        ]

    @staticmethod
    def _choose(
        logits_BV: Tensor, rows: list[_Running], params: SamplingParams, stops: frozenset[int]
    ) -> tuple[list[int], list[float]]:
        early = [i for i, row in enumerate(rows) if len(row.token_ids) < params.min_tokens]
        if early and stops:
            logits_BV = logits_BV.to(torch.float32, copy=True)
            where = [torch.tensor(x, device=logits_BV.device) for x in (early, sorted(stops))]
            logits_BV[where[0][:, None], where[1]] = float("-inf")
        draws = torch.tensor([uniform(r.key, len(r.token_ids)) for r in rows], dtype=torch.float64)
        tokens, logps = choose(
            logits_BV,
            draws.to(logits_BV.device),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        return tokens.tolist(), logps.tolist()

    @staticmethod
    def _retire(running: list[_Running], ended: list[_Running], slots: Slots) -> None:
        """Removes ended sequences, highest row first, keeping rows 0..B-1 full."""
        gone = {id(row) for row in ended}
        for row in reversed([i for i, r in enumerate(running) if id(r) in gone]):
            last = len(running) - 1
            if row != last:
                slots.move(last, row, running[last].length)
                running[row] = running[last]
            running.pop()


@contextmanager
def evaluating(model: Any) -> Any:
    """The model in evaluation mode within, as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
