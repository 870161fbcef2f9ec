"""Step 2: what the rewards say of each trace, and the measures that the filters look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.traces import Trace, pieces
from rewards import Reward, score
from rewards.language import language_share
from rewards.repetition import repetition
from rl.distill.check import TRACE_COLUMNS
from rl.prompts import columns_of
from rl.run.progress import Progress

NGRAM = 20
_BATCH = 512

Pair = tuple[Trace, Mapping[str, Any]]  # a trace and the problem that it answers, with every column of it
Encode = Callable[[str], Sequence[Any]]  # text -> tokens, of whatever kind


def verify(
    traces: Sequence[Pair],
    rewards: Sequence[Reward],
    *,
    encode: Encode = pieces,
    language: str | None,
    progress: Progress | None = None,
) -> list[Trace]:
    """The traces with reward, verdict, token counts and shares. Rewards see every column of a trace's problem."""
    verified: list[Trace] = []
    for start in range(0, len(traces), _BATCH):
        verified += _verified(traces[start : start + _BATCH], rewards, encode, language)
        if progress is not None:
            progress.update(f"verifying: {len(verified)}/{len(traces)}")
    return verified


def _verified(batch: Sequence[Pair], rewards: Sequence[Reward], encode: Encode, language: str | None) -> list[Trace]:
    prompts = [row.get("prompt") or [{"role": "user", "content": trace.prompt}] for trace, row in batch]
    responses = [trace.response for trace, _ in batch]
    columns = {name: values for name, values in columns_of([row for _, row in batch]).items() if name != "prompt"}
    tokens = [list(encode(response)) for response in responses]
    totals, verdicts = [math.nan] * len(batch), None
    if rewards:
        scores = score(rewards, prompts, responses, tokens, columns)
        totals, verdicts = scores.total, scores.verdicts
    return [
        replace(
            trace,
            reward=None if math.isnan(totals[i]) else totals[i],
            verdict=verdicts[i] if verdicts else None,
            thinking_tokens=len(encode(trace.thinking)) if trace.thinking else 0,
            answer_tokens=len(encode(trace.answer)) if trace.answer else 0,
            language=None if language is None else language_share(trace.thinking or trace.answer, language),
            repetition=-repetition([pieces(trace.thinking or trace.answer)], n=NGRAM)[0],
        )
        for i, (trace, _) in enumerate(batch)
    ]


def columns_of_trace(trace: Trace) -> dict[str, Any]:
    """What the rewards see of an imported trace that is joined with no problem."""
    values = (trace.id, trace.prompt, trace.gold, trace.kind, trace.source)
    return dict(zip(TRACE_COLUMNS, values, strict=True))
