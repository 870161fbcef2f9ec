"""Speculative decoding with the model's own prediction module (V3 report, section 5.4.3; arXiv 2211.17192).

The module drafts M tokens; one forward of the model judges them all and draws one token more. What comes out has
exactly the model's own distribution: a draft d, drawn from q, is kept with probability min(1, p(d) / q(d)), and in
place of the first that is not, a token is drawn from max(p - q, 0), normalised (algorithm 1 and appendix A.1 there).

B sequences, W = M + 1 tokens that the model sees a step, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl.rollout.sampling import draw, process_logits
from rl.rollout.slots import DecodeLayout, Slots


@dataclass
class Acceptance:
    """How far drafts were right, over all steps of all sequences."""

    accepted: list[int]  # per place in the draft: how often it and all before it were kept
    steps: int = 0
    tokens: int = 0  # that came out, the one after the kept drafts included

    def add(self, counts: Sequence[int]) -> None:
        """Of one step: how many tokens came out of it for each sequence."""
        self.steps += len(counts)
        self.tokens += sum(counts)
        for i in range(len(self.accepted)):
            self.accepted[i] += sum(count > i + 1 for count in counts)

    def sums(self) -> dict[str, float]:
        """What can be added up over processes; see `acceptance_rates`."""
        places = {f"accepted/{i}": float(n) for i, n in enumerate(self.accepted, start=1)}
        return {"steps": float(self.steps), "tokens": float(self.tokens), **places}


def acceptance_rates(sums: dict[str, float]) -> dict[str, float]:
    """accepted/i: share of steps whose i-th draft was kept; tokens_per_step: the mean that comes out of a step."""
    steps = sums["steps"]
    rates = {name: value / steps for name, value in sums.items() if name.startswith("accepted/")} if steps else {}
    return {**rates, "tokens_per_step": sums["tokens"] / steps} if steps else {}


@dataclass
class Pending:
    """Tokens of one sequence that the prediction module has not seen: the ids, and the model's states before each."""

    token_ids: list[int]
    state_NC: Tensor


class Drafter:
    """Runs the first prediction module, which keeps its own latents in the slots, on its own drafts again if M > 1."""

    def __init__(self, model: Any, slots: Slots, drafts: int):
        self.decoder, self.head = model.model, model.lm_head
        self.slots, self.drafts = slots, drafts

    def draft(
        self, pending: Sequence[Pending], lengths: Sequence[int], uniform_BM: Tensor, **processing: Any
    ) -> tuple[Tensor, Tensor]:
        """(tokens [B, M], the distributions [B, M, V] that they were drawn from).

        lengths: tokens whose keys are in the model's slots, the newest token (the last pending one) not among them.
        """
        width = self.drafts + 1
        device = pending[0].state_NC.device
        counts = [len(p.token_ids) for p in pending]
        start_B = torch.tensor([n - c for n, c in zip(lengths, counts, strict=True)], device=device)
        ids_BW = torch.tensor([p.token_ids + [0] * (width - len(p.token_ids)) for p in pending], device=device)
        state_BWC = torch.nn.utils.rnn.pad_sequence([p.state_NC for p in pending], batch_first=True)
        state_BWC = torch.nn.functional.pad(state_BWC, (0, 0, 0, width - state_BWC.shape[1]))
        state, normed = self._run(state_BWC, ids_BW, start_B)
        last_B = torch.tensor(counts, device=device) - 1
        rows_B = torch.arange(len(counts), device=device)
        state, normed, place_B = state[rows_B, last_B], normed[rows_B, last_B], start_B + last_B
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for m in range(self.drafts):
            if m:
                place_B = place_B + 1
                state, normed = (x[:, 0] for x in self._run(state[:, None], tokens[-1][:, None], place_B))
            probability = process_logits(self.head(normed), **processing).softmax(-1)
            greedy = processing["temperature"] == 0
            tokens.append(probability.argmax(-1) if greedy else draw(probability, uniform_BM[:, m]))
            probabilities.append(probability)
        return torch.stack(tokens, 1), torch.stack(probabilities, 1)

    def _run(self, state_BWC: Tensor, ids_BW: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
        batch, width = ids_BW.shape
        layout = DecodeLayout(self.slots, start_B, int(start_B.max()) + width, width)
        flat = (state_BWC.flatten(0, 1)[None], ids_BW.reshape(1, -1), layout.positions_BW.reshape(1, -1))
        state, normed = self.decoder.predict(*flat, layout)
        return state[0].unflatten(0, (batch, width)), normed[0].unflatten(0, (batch, width))


def verify(
    logits_BWV: Tensor,
    draft_BM: Tensor,
    q_BMV: Tensor,
    accept_BM: Tensor,
    uniform_BW: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(how many drafts are kept [B], the token drawn after them [B], log-probabilities of both kinds [B, W]).

    q: the distributions that the drafts were drawn from. accept, uniform: numbers in [0, 1) for the decisions and for
    the draw at each place. Log-probabilities are the model's own in the processed distribution; those beyond the drawn
    token mean nothing. Temperature 0: the likeliest token at each place.
    """
    batch, width, vocabulary = logits_BWV.shape
    drafts = width - 1
    p_BWV = process_logits(logits_BWV.flatten(0, 1), temperature, top_k, top_p).softmax(-1).view_as(logits_BWV)
    p_draft = p_BWV[:, :drafts].gather(-1, draft_BM[..., None])[..., 0]
    if temperature == 0:
        kept_BM = draft_BM == p_BWV[:, :drafts].argmax(-1)
    else:
        kept_BM = accept_BM * q_BMV.gather(-1, draft_BM[..., None])[..., 0] < p_draft
    count_B = kept_BM.long().cumprod(1).sum(1)
    rows_B = torch.arange(batch, device=logits_BWV.device)
    p_BV = p_BWV[rows_B, count_B]
    if temperature == 0:
        token_B = p_BV.argmax(-1)
    else:
        rejected = (count_B < drafts)[:, None]
        rest_BV = torch.where(rejected, (p_BV - q_BMV[rows_B, count_B.clamp(max=drafts - 1)]).clamp(min=0), p_BV)
        # p = q up to rounding: nothing is left over, and any draw from p is right.
        rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
        token_B = draw(rest_BV, uniform_BW[rows_B, count_B])
    p_BW = torch.cat([p_draft, p_draft[:, :1]], 1)
    p_BW[rows_B, count_B] = p_BV[rows_B, token_B]
    return count_B, token_B, p_BW.log()
