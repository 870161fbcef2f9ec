"""Ragged prompt/completion pairs -> padding-free packs under a token budget.

A group's prompt can stand once in a pack, shared by its completions (see `PackedLayout`): with 8 samples of
a 90-token prompt that is a third of all tokens not computed, and exactly the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rl.policy.attention import PackedLayout, Segment


@dataclass(frozen=True)
class Document:
    """One prompt and its completion. `mask` says which completion tokens are in the loss (None = all).

    Completion tokens outside the mask (a tool's output, say) are read but not trained on.
    `group`: documents with equal group have the same prompt.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    mask: Sequence[bool] | None = None
    group: int = -1
    routed: Tensor | None = None  # [tokens read, L, K]: experts to meet again, see Sample.routed_experts

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class Pack:
    """One micro-batch: T packed tokens, of which P positions predict a target in the loss.

    predictor_P indexes the packed tokens: the hidden state there predicts target_P. sequence_P numbers the
    document (index into the list given to `pack`); offset_P is the target's place in its completion.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    segments: list[Segment]
    predictor_P: Tensor
    target_P: Tensor
    sequence_P: Tensor
    offset_P: Tensor
    documents: list[int] = field(default_factory=list)
    routed_TLK: Tensor | None = None  # where the documents carry it

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    def layout(self) -> PackedLayout:
        return PackedLayout(self.segments)

    def gather(self, per_document: Sequence[Sequence[float] | Tensor]) -> Tensor:
        """Per-token values of completions (indexed by document, then by offset) -> float32 [P]."""
        values = [torch.as_tensor(per_document[d], dtype=torch.float32) for d in self.documents]
        starts = {d: i for d, i in zip(self.documents, _starts([len(v) for v in values]), strict=True)}
        flat = torch.cat(values) if values else torch.zeros(0)
        start_P = torch.tensor([starts[d] for d in self.sequence_P.tolist()], dtype=torch.long)
        return flat[start_P + self.offset_P]


def pack(
    documents: Sequence[Document],
    *,
    tokens_per_microbatch: int,
    share_prompts: bool = True,
    padded: bool = False,
) -> list[Pack]:
    """Splits documents into packs of at most tokens_per_microbatch tokens (a longer document stands alone).

    Deterministic; every document is in exactly one pack. `padded` is the fallback for architectures whose
    documents would see each other: one document a pack.
    """
    if padded:
        return [_build(documents, [[i]]) for i in range(len(documents))]
    units: list[tuple[int, list[int]]] = []  # (tokens, documents of one prompt that stay together)
    if share_prompts:
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, document in enumerate(documents):
            groups[(document.group, i if document.group < 0 else 0)].append(i)
        for members in groups.values():
            units += _split_group(documents, members, tokens_per_microbatch)
    else:
        units = [(len(document), [i]) for i, document in enumerate(documents)]

    # First fit, longest first.
    bins: list[tuple[int, list[list[int]]]] = []
    for size, members in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        for b, (used, content) in enumerate(bins):
            if used + size <= tokens_per_microbatch:
                bins[b] = (used + size, [*content, members])
                break
        else:
            bins.append((size, [members]))
    return [_build(documents, content) for _, content in bins]


def idle_pack() -> Pack:
    """One token that predicts nothing: a forward and a backward that change no sum."""
    return replace(_build([Document([0], [])], [[0]]), documents=[])


def _split_group(documents: Sequence[Document], members: list[int], budget: int) -> list[tuple[int, list[int]]]:
    """Chunks of a group such that prompt + completions fit the budget."""
    prompt = len(documents[members[0]].prompt_ids)
    chunks: list[tuple[int, list[int]]] = []
    for i in members:
        size = len(documents[i].completion_ids)
        if chunks and chunks[-1][0] + size <= budget:
            chunks[-1] = (chunks[-1][0] + size, [*chunks[-1][1], i])
        else:
            chunks.append((prompt + size, [i]))
    return chunks


def _build(documents: Sequence[Document], units: list[list[int]]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictor: list[int] = []
    target: list[int] = []
    sequence: list[int] = []
    offset: list[int] = []
    routed: list[Tensor | None] = []
    for members in units:
        prompt = documents[members[0]].prompt_ids
        routed.append(_routed(documents[members[0]], 0, len(prompt)))
        alone = len(members) == 1
        prompt_start = len(ids)
        ids += prompt
        positions += range(len(prompt))
        if not alone:
            segments.append(Segment(prompt_start, len(prompt)))
        for d in members:
            completion, mask = documents[d].completion_ids, documents[d].mask
            start = len(ids)
            # The last token predicts nothing that is trained on, so it need not be computed.
            read = completion[:-1]
            ids += read
            routed.append(_routed(documents[d], len(prompt), len(prompt) + len(read)))
            positions += range(len(prompt), len(prompt) + len(read))
            if alone:
                segments.append(Segment(prompt_start, len(prompt) + len(read)))
            elif len(read):
                segments.append(Segment(start, len(read), prompt_start, len(prompt)))
            for t, token in enumerate(completion):
                if mask is None or mask[t]:
                    predictor.append(start + t - 1 if t else prompt_start + len(prompt) - 1)
                    target.append(token)
                    sequence.append(d)
                    offset.append(t)
    return Pack(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        segments=segments,
        predictor_P=torch.tensor(predictor, dtype=torch.long),
        target_P=torch.tensor(target, dtype=torch.long),
        sequence_P=torch.tensor(sequence, dtype=torch.long),
        offset_P=torch.tensor(offset, dtype=torch.long),
        documents=[d for members in units for d in members],
        routed_TLK=None if any(r is None for r in routed) else torch.cat(routed),  # type: ignore[arg-type]
    )


def _routed(document: Document, start: int, stop: int) -> Tensor | None:
    return None if document.routed is None else document.routed[start:stop]


def _starts(lengths: list[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
