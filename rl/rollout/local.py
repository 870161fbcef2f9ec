"""`LocalSampler`: in-process sampling with continuous batching over preallocated key/value slots.

One loop: admit prompts while rows are free (each prompt is prefilled once, its keys and values copied to a
row per sample), decode one token for every running row (or, with drafts, several), retire finished rows by
moving the last one there.
"""

from __future__ import annotations

import secrets
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.fp8.context import quantize_weights
from rl.policy.attention import PackedLayout, Segment, packed_attention
from rl.policy.load import SUPPORTED_TYPES, stop_token_ids
from rl.rollout.decode import Decoded, DecodeStep, routed_experts
from rl.rollout.fallback import generate_with_transformers
from rl.rollout.prepacked import prepacked
from rl.rollout.sampling import choose, stream_key, uniform
from rl.rollout.slots import Slots
from rl.rollout.speculative import Acceptance, Drafter, Pending, verify
from rl.rollout.types import Sample, SamplingParams, streams_of


@dataclass
class _Prompt:
    """A prefilled prompt whose samples are not all admitted yet."""

    index: int
    ids: Sequence[int]
    start: int  # where it stands in the prefilled pack
    recorded: dict[int, tuple[Tensor, ...]]
    logits_V: Tensor
    state_C: Tensor | None  # what a prediction module reads of its last token
    routed_TLK: Tensor | None
    next_sample: int = 0


@dataclass
class _Running:
    """A sequence being decoded; its row in the slots is its place in the list of running ones."""

    prompt: int
    sample: int
    key: int
    length: int  # tokens whose keys are in the slot
    pending_NC: Tensor | None  # states of the newest of these, which a prediction module has not seen
    routed: list[Tensor]  # experts of these tokens, in pieces [n, L, K]; empty if nobody asked
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def pending(self) -> Pending:
        assert self.pending_NC is not None
        return Pending(self.token_ids[-len(self.pending_NC) :], self.pending_NC)

    def uniform(self, ahead: int = 0, use: int | None = None) -> float:
        """The number for the token that comes `ahead` tokens after the next; drafts have streams of their own."""
        key = self.key if use is None else stream_key(self.key, use)
        return uniform(key, len(self.token_ids) + ahead)


class LocalSampler:
    """Samples from a Hugging Face causal LM in this process; the weights are the model's own tensors.

    max_slots: sequences decoded at a time. prefill_tokens: prompt tokens per prefill forward.
    slots: whether to drive the model's attention ourselves; None = if its type is known to allow it.
    Architectures whose attention we cannot drive fall back to transformers' `generate`, announced once.
    draft_tokens: speculative decoding with the model's multi-token prediction module, so many drafts a step; 0 = none.
        `acceptance` says how the last call's drafts did.
    record_routing: samples carry the experts that each token met (mixtures of experts of our own).
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
        draft_tokens: int = 0,
        record_routing: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.version = version
        self.progress = progress  # called with (completions done, completions asked for)
        self.stop_ids = stop_token_ids(model, tokenizer)
        self.supported = model.config.model_type in SUPPORTED_TYPES if slots is None else slots
        self.draft_tokens, self.record_routing = draft_tokens, record_routing
        self.acceptance = Acceptance([0] * draft_tokens)
        self._slots: Slots | None = None
        self._step: DecodeStep | None = None
        ours = self.supported and hasattr(model.base_model, "prediction_modules")
        if draft_tokens and not (ours and model.base_model.prediction_modules):
            raise ValueError(
                "draft_tokens: the model has no multi-token prediction module to draft with "
                "(num_nextn_predict_layers is 0, or it is not a DeepSeek-V3 of our own); set draft_tokens to 0"
            )
        if record_routing and not ours:
            raise ValueError(f"record_routing: a {model.config.model_type} does not tell which experts tokens meet")
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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        complete = dict(group for groups in self.stream(prompts, params, streams=streams) for group in groups)
        return [complete[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> Generator[list[tuple[int, list[Sample]]], None, None]:
        """`generate` bit by bit: after each token, the places of prompts that are complete by it, and their samples.

        Until it ends, the model's weights must stay as they are and nothing else may run it.
        """
        numbers = streams_of(prompts, streams)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        keys = [stream_key(seed, number) for number in numbers]
        stops = frozenset({*self.stop_ids, *params.stop_token_ids})
        with evaluating(self.model):
            quantize_weights(self.model)
            if not self.supported:
                samples = generate_with_transformers(
                    self.model, prompts, params, keys, stops, self.version, self.max_slots
                )
                yield list(enumerate(samples))
                return
            rows = min(self.max_slots, len(prompts) * params.n) * (self.draft_tokens + 1)
            try:
                with packed_attention(self.model), prepacked(self.model, rows):
                    yield from self._stream(prompts, params, keys, stops)
            finally:
                if self.model.device.type == "cpu":  # nothing is captured there that is worth the memory in training
                    self.release()

    def _stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, keys: list[int], stops: frozenset[int]
    ) -> Generator[list[tuple[int, list[Sample]]], None, None]:
        total = len(prompts) * params.n
        done: list[list[Sample | None]] = [[None] * params.n for _ in prompts]
        capacity = max((len(p) for p in prompts), default=0) + params.max_tokens + self.draft_tokens
        slots, step = self._buffers(min(self.max_slots, total), capacity)
        drafter = Drafter(self.model, slots, self.draft_tokens) if self.draft_tokens else None
        self.acceptance = Acceptance([0] * self.draft_tokens)
        # Longest prompts first: short ones fill the gaps that finished sequences leave at the end.
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
        ready: deque[_Prompt] = deque()
        running: list[_Running] = []
        finished = 0
        complete: list[int] = []  # prompts whose last sample ended in this step

        def settle(rows: list[_Running], tokens: list[list[int]], logps: list[list[float]]) -> list[_Running]:
            """Appends the drawn tokens, up to one that ends its sequence; returns the sequences that ended."""
            nonlocal finished
            ended = []
            for row, new, new_logps in zip(rows, tokens, logps, strict=True):
                for token, logp in zip(new, new_logps, strict=True):
                    row.token_ids.append(token)
                    row.logprobs.append(logp)
                    if token in stops or len(row.token_ids) == params.max_tokens:
                        done[row.prompt][row.sample] = self._sample(row, len(prompts[row.prompt]), token in stops)
                        ended.append(row)
                        if None not in done[row.prompt]:
                            complete.append(row.prompt)
                        break
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
                    key = stream_key(keys[prompt.index], j)
                    state = None if prompt.state_C is None else prompt.state_C[None]
                    routed = [] if prompt.routed_TLK is None else [prompt.routed_TLK]
                    admitted.append(_Running(prompt.index, j, key, len(prompt.ids), state, routed))
                    first_logits.append(prompt.logits_V)
                prompt.next_sample += take
                if prompt.next_sample == params.n:
                    ready.popleft()
            if admitted:
                ended = settle(admitted, *self._choose(torch.stack(first_logits), admitted, params, stops))
                running += admitted
                self._retire(running, ended, slots)
            if running:
                if drafter:
                    drawn = self._speculate(drafter, step, running, params, stops)
                else:
                    drawn = self._advance(step, running, params, stops)
                self._retire(running, settle(running, *drawn), slots)
            yield [(i, done[i]) for i in complete]  # type: ignore[misc]
            complete.clear()

    def _buffers(self, count: int, capacity: int) -> tuple[Slots, DecodeStep]:
        if self._slots is None or self._slots.count < count or self._slots.capacity < capacity:
            self._slots = Slots(count, capacity, fixed=self.model.device.type == "cuda")
            self._step = DecodeStep(self.model, self._slots, self.draft_tokens + 1, routed=self.record_routing)
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
        recorded: dict[int, tuple[Tensor, ...]] = {}
        last = torch.tensor([s.start + s.length - 1 for s in segments], device=device)
        out = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            layout=PackedLayout(segments, recorded),
            logits_to_keep=last,
            **({"mtp": True} if self.draft_tokens else {}),  # so that the module's latents are recorded too
        )
        states = out.mtp_state[0, last] if self.draft_tokens else [None] * len(chosen)
        routed = self._kept_routing(routed_experts(out)) if self.record_routing else None
        return [
            _Prompt(
                i,
                prompts[i],
                segment.start,
                recorded,
                out.logits[0, row],
                states[row],
                None if routed is None else routed[segment.start : segment.start + segment.length],
            )
            for row, (i, segment) in enumerate(zip(chosen, segments, strict=True))
        ]

    def _advance(
        self, step: DecodeStep, rows: list[_Running], params: SamplingParams, stops: frozenset[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One token for every sequence."""
        decoded = step([r.token_ids[-1:] for r in rows], [r.length for r in rows])
        self._seen(rows, decoded, [1] * len(rows))
        return self._choose(decoded.logits_BWV[:, 0], rows, params, stops)

    def _speculate(
        self, drafter: Drafter, step: DecodeStep, rows: list[_Running], params: SamplingParams, stops: frozenset[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The drafts that are kept and one token more for every sequence."""
        device, width = step.device, step.width
        numbers = [  # for drawing drafts, for keeping them, for the token that is drawn after them
            torch.tensor([[r.uniform(j, use) for j in range(width)] for r in rows], dtype=torch.float64, device=device)
            for use in (1, 2, None)
        ]
        processing: dict[str, Any] = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        drafts, q = drafter.draft([r.pending for r in rows], [r.length for r in rows], numbers[0], **processing)
        newest = [r.token_ids[-1:] + draft for r, draft in zip(rows, drafts.tolist(), strict=True)]
        decoded = step(newest, [r.length for r in rows])
        logits = self._without_early_stops(decoded.logits_BWV, rows, params, stops)
        kept, token, logps = verify(logits, drafts, q, numbers[1][:, :-1], numbers[2], **processing)
        counts = [n + 1 for n in kept.tolist()]
        self._seen(rows, decoded, counts)
        self.acceptance.add(counts)
        tokens = [row[1:n] + [t] for row, n, t in zip(newest, counts, token.tolist(), strict=True)]
        return tokens, [row[:n] for row, n in zip(logps.tolist(), counts, strict=True)]

    def _seen(self, rows: list[_Running], decoded: Decoded, counts: list[int]) -> None:
        """Of the tokens that a step has seen, the first `counts` of each row are part of the sequence."""
        routed = self._kept_routing(decoded.routed_BWLK)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            row.length += count
            if self.draft_tokens and decoded.state_BWC is not None:
                row.pending_NC = decoded.state_BWC[i, :count]
            if routed is not None:
                row.routed.append(routed[i, :count])

    def _kept_routing(self, routed: Tensor | None) -> Tensor | None:
        """Expert indices as they go with samples; a byte each where that is enough."""
        if routed is None:
            return None
        return routed.to("cpu", torch.uint8 if self.model.config.n_routed_experts <= 256 else torch.int16)

    def _sample(self, row: _Running, prompt_length: int, stopped: bool) -> Sample:
        seen = prompt_length + len(row.token_ids) - 1
        routed = torch.cat(row.routed)[:seen].numpy() if row.routed else None
        return Sample(row.token_ids, row.logprobs, "stop" if stopped else "length", self.version, routed)

    def _choose(
        self, logits_BV: Tensor, rows: list[_Running], params: SamplingParams, stops: frozenset[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        draws = torch.tensor([r.uniform() for r in rows], dtype=torch.float64)
        tokens, logps = choose(
            self._without_early_stops(logits_BV[:, None], rows, params, stops)[:, 0],
            draws.to(logits_BV.device),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        return tokens[:, None].tolist(), logps[:, None].tolist()

    @staticmethod
    def _without_early_stops(
        logits_BWV: Tensor, rows: list[_Running], params: SamplingParams, stops: frozenset[int]
    ) -> Tensor:
        """-inf for stop tokens at places before min_tokens."""
        early = [
            (i, j)
            for i, row in enumerate(rows)
            for j in range(min(logits_BWV.shape[1], params.min_tokens - len(row.token_ids)))
        ]
        if not early or not stops:
            return logits_BWV
        logits_BWV = logits_BWV.to(torch.float32, copy=True)
        place = torch.tensor(early, device=logits_BWV.device)
        logits_BWV[place[:, :1], place[:, 1:], torch.tensor(sorted(stops), device=logits_BWV.device)] = float("-inf")
        return logits_BWV

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
