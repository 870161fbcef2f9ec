"""A judge behind an OpenAI-compatible URL: an LLM with a rubric, or a reward model (R1's stage 2 has such rewards).

    mode "chat"           r = (score - low) / (high - low)    from 0 to 1; the score from the judge's `SCORE:` line
    mode "reward_model"   r = the model's own number, unscaled

Requests run concurrently and are retried with exponential back-off and jitter. The scores are cached by everything
that a request says. None: no score could be had (after the retries, or the reply holds none); how many is logged, and
counted with the reward's other Nones. A server can never make it raise; wrong args do, before a run starts.

A judge can be talked into a good grade by the text that it grades. `rubric` says what is done against that; still,
keep a judge's weight small beside rewards that verify, and read samples with high scores.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

from .cache import check_cache, score_cache
from .http_json import bearer, chat_url, check_url
from .http_retry import post_json_retrying
from .judge_api import Judge, judged_text, payload_of, score_of
from .messages import Completion
from .rubric import DEFAULT_RUBRIC, check_rubric

logger = logging.getLogger(__name__)
_REWARD_MODEL_ENDPOINTS = ("classify", "score", "pooling")


def judge(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    reference: Sequence[str | None] | None = None,
    *,
    url: str,
    model: str | None = None,
    mode: Literal["chat", "reward_model"] = "chat",
    rubric: str = DEFAULT_RUBRIC,
    low: float = 0.0,
    high: float = 10.0,
    part: Literal["answer", "all"] = "answer",
    concurrency: int = 16,
    timeout_s: float = 120.0,
    retries: int = 4,
    backoff_s: float = 1.0,
    cache: str | None = None,
    api_key_env: str | None = None,
    body: Mapping[str, Any] | None = None,
    prefill: str = "",
) -> Coroutine[Any, Any, list[float | None]]:
    """To be awaited: one number or None per completion.

    reference: a data column with a right answer to compare with, shown to a chat judge where it is not None.
    url: of the API, such as http://localhost:8000/v1, for "chat"; of the endpoint itself, ending in /classify,
        /score or /pooling (as vLLM serves them), for "reward_model".
    model: the server's name of the model; needed for "chat".
    rubric: with {completion}, and {prompt}, {reference}, {low}, {high} as wanted; must ask for a `SCORE:` line.
    part: judge the text after the last </think> only (R1 judges helpfulness so), or all of it.
    concurrency: requests at a time, in this process.
    timeout_s: of one request. retries: further tries on 408, 409, 425, 429, 5xx and broken connections.
    backoff_s: the k-th retry waits up to backoff_s * 2^k, or as long as the server asks; at most a minute.
    cache: a file that keeps scores between runs; None keeps them in memory.
    api_key_env: the environment variable that holds the key; the key itself never stands in a recipe or a log.
    body: further fields of the request, such as {max_tokens: 512}; null removes a field.
    Raises ValueError for wrong args at once, before anything is awaited.
    """
    asked = Judge(
        url=_endpoint_url(url, mode),
        endpoint="chat" if mode == "chat" else url.rstrip("/").rpartition("/")[2],  # type: ignore[arg-type]
        model=model,
        rubric=rubric,
        low=low,
        high=high,
        concurrency=concurrency,
        timeout_s=timeout_s,
        retries=retries,
        backoff_s=backoff_s,
        body=dict(body or {}),
        headers=bearer(api_key_env),
        cache=cache,
    )
    _check(asked, part)
    texts = [judged_text(completion, part, prefill) for completion in completions]
    references = [None] * len(texts) if reference is None else list(reference)
    return _scores(asked, [*zip(prompts, texts, references, strict=True)])


def _endpoint_url(url: str, mode: str) -> str:
    if mode == "chat":
        return chat_url(url)
    if mode != "reward_model":
        raise ValueError(f"mode must be 'chat' or 'reward_model', not {mode!r}")
    base = check_url(url).rstrip("/")
    if base.rpartition("/")[2] not in _REWARD_MODEL_ENDPOINTS:
        raise ValueError(f"url of a reward model must end in /{', /'.join(_REWARD_MODEL_ENDPOINTS)}, not {url!r}")
    return base


def _check(asked: Judge, part: str) -> None:
    if asked.endpoint == "chat" and not asked.model:
        raise ValueError("model is needed: the server's name of the judge")
    if not asked.low < asked.high:
        raise ValueError(f"need low < high, got low={asked.low}, high={asked.high}")
    if part not in ("answer", "all"):
        raise ValueError(f"part must be 'answer' or 'all', not {part!r}")
    if asked.concurrency < 1 or not asked.timeout_s > 0 or asked.retries < 0 or not asked.backoff_s >= 0:
        raise ValueError("need concurrency >= 1, timeout_s > 0, retries >= 0 and backoff_s >= 0")
    check_rubric(asked.rubric)
    check_cache(asked.cache)
    json.dumps(asked.body)


# -- asking ----------------------------------------------------------------------------------------


async def _scores(asked: Judge, samples: list[tuple[Any, str, str | None]]) -> list[float | None]:
    keys, cache = [_key(asked, sample) for sample in samples], score_cache(asked.cache)
    wanted = {key: sample for key, sample in zip(keys, samples, strict=True)}  # equal samples are asked once
    found = {key: score for key in wanted if (score := cache.get(key)) is not None}
    missing = [key for key in wanted if key not in found]
    reasons: Counter[str] = Counter()
    loop, stop = asyncio.get_running_loop(), threading.Event()
    pool = ThreadPoolExecutor(asked.concurrency, thread_name_prefix="judge")
    try:
        waiting = [loop.run_in_executor(pool, _ask, asked, wanted[key], stop) for key in missing]
        for key, answer in zip(missing, await asyncio.gather(*waiting), strict=True):
            if isinstance(answer, str):
                reasons[answer] += 1
            else:
                found[key] = answer
                cache.put(key, answer)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if reasons:
        told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        host = urlsplit(asked.url).hostname
        logger.warning("judge at %s: %d of %d requests gave no score: %s", host, reasons.total(), len(missing), told)
    return [found.get(key) for key in keys]


def _key(asked: Judge, sample: tuple[Any, str, str | None]) -> str:
    """Of the whole request but its random mark and its credentials."""
    payload = payload_of(asked, *sample, mark="")
    text = json.dumps([asked.url, asked.low, asked.high, payload], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _ask(asked: Judge, sample: tuple[Any, str, str | None], stop: threading.Event) -> float | str:
    """The score, or why there is none."""
    outcome = post_json_retrying(
        asked.url,
        payload_of(asked, *sample, mark=secrets.token_hex(8)),
        asked.headers,
        timeout_s=asked.timeout_s,
        retries=asked.retries,
        backoff_s=asked.backoff_s,
        stop=stop,
    )
    if outcome.reply is None or not outcome.ok:
        return outcome.failures[-1]
    score = score_of(asked, outcome.reply.body)
    return "the reply holds no score" if score is None else score
