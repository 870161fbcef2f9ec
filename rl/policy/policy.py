"""A policy: a causal LM whose packed tokens' log-probabilities can be had, with gradient or without."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rl.policy.attention import packed_attention
from rl.policy.load import SUPPORTED_TYPES
from rl.policy.logprobs import Head, token_logprobs
from rl.policy.moe import Auxiliary, ExpertTraining, replayed
from rl.policy.packing import Document, Pack, pack


class Policy:
    """Wraps a Hugging Face causal LM.

    `packed` is False for architectures whose documents would see each other in a pack: those are run
    one document at a time through the model's own attention.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        logits_chunk: int = 1024,
        experts: ExpertTraining | None = None,
    ):
        self.model = model
        self.experts = experts  # where the model is a mixture of experts of ours that is trained
        self.temperature = temperature
        self.logits_chunk = logits_chunk
        self.packed = model.config.model_type in SUPPORTED_TYPES
        self.checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        self.head = head_of(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logprobs(self, batch: Pack) -> tuple[Tensor, Tensor]:
        """(log-probability, entropy) of the pack's targets, both [P] float32, in nats."""
        return self._score(batch, self.states(batch))

    def training_logprobs(self, batch: Pack) -> tuple[Tensor, Tensor, Auxiliary | None]:
        """`logprobs`, and what a mixture of experts adds to the loss."""
        hidden, auxiliary = self.training_states(batch)
        return *self._score(batch, hidden), auxiliary

    def states(self, batch: Pack) -> Tensor:
        """Hidden states [P, C] from which the head predicts the pack's targets."""
        return self._predictors(batch, self._decode(batch))

    def training_states(self, batch: Pack) -> tuple[Tensor, Auxiliary | None]:
        """`states`, and what a mixture of experts adds to the loss."""
        if self.experts is None:
            return self.states(batch), None
        out = self._decode(batch, training=True, **self.experts.inputs())
        return self._predictors(batch, out), self.experts.auxiliary(out, batch, self.head)

    def _decode(self, batch: Pack, training: bool = False, **asked: Any) -> Any:
        """The decoder's output on a pack."""
        device = self.device
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids[None].to(device),
            "position_ids": batch.position_ids[None].to(device),
            "use_cache": False,
            **asked,
        }
        if self.experts is not None and batch.routed_TLK is not None:
            inputs["routing"] = replayed(batch, self.model, device)
        decoder = self.model.base_model
        # transformers checkpoints activations only in training mode, and our mixture of experts counts its loads only
        # there; dropout was taken out when loading.
        self.model.train(torch.is_grad_enabled() and (self.checkpointing or training))
        if self.packed:
            with packed_attention(self.model):
                return decoder(**inputs, layout=batch.layout())
        if len(batch.segments) != 1:
            raise ValueError("this architecture cannot be packed: pack with padded=True")
        return decoder(**inputs)

    def _predictors(self, batch: Pack, out: Any) -> Tensor:
        hidden: Tensor = out.last_hidden_state[0]
        return hidden[batch.predictor_P.to(hidden.device)]

    def _score(self, batch: Pack, hidden_PC: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            hidden_PC,
            batch.target_P.to(hidden_PC.device),
            self.head,
            temperature=self.temperature,
            chunk=self.logits_chunk,
        )

    def pack(self, documents: list[Document], tokens_per_microbatch: int, share_prompts: bool = True) -> list[Pack]:
        whole = self.experts is not None and self.experts.whole_documents
        return pack(
            documents,
            tokens_per_microbatch=tokens_per_microbatch,
            share_prompts=share_prompts and not whole,
            padded=not self.packed,
        )

    @torch.no_grad()
    def check_packing(self, tolerance: float | None = None) -> float:
        """Compares packed log-probabilities with separate plain forwards on three random documents.

        If they differ (an architecture that leaks, or a head this code does not know), falls back to one
        document a forward, with a warning; if even that differs, raises. Returns the largest difference in
        nats.
        """
        tolerance = tolerance or (5e-4 if self.model.dtype == torch.float32 else 0.25)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
        prompt = draw(7)
        documents = [
            Document(prompt, draw(9), group=0),
            Document(prompt, draw(5), group=0),
            Document(draw(4), draw(8), group=1),
        ]
        expected = [self._plain_logprobs(d) for d in documents]
        difference = self._difference(documents, expected)
        if difference > tolerance and self.packed:
            warnings.warn(
                f"packed {self.model.config.model_type} differs from separate forwards by {difference:.2g} nats: "
                "falling back to one document a forward",
                stacklevel=2,
            )
            self.packed = False
            difference = self._difference(documents, expected)
        if difference > tolerance:
            raise ValueError(
                f"log-probabilities of {type(self.model).__name__} differ from the model's own logits by "
                f"{difference:.2g} nats: its output head is not understood"
            )
        return difference

    def _difference(self, documents: list[Document], expected: list[Tensor]) -> float:
        worst = 0.0
        for batch in self.pack(documents, 10_000):
            logp, _ = self.logprobs(batch)
            worst = max(worst, float((logp.cpu() - batch.gather(expected)).abs().max()))
        return worst

    def _plain_logprobs(self, document: Document) -> Tensor:
        ids = torch.tensor([[*document.prompt_ids, *document.completion_ids]], device=self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0].float() / self.temperature
        start = len(document.prompt_ids)
        logp = logits[start - 1 : -1].log_softmax(-1)
        return logp.gather(-1, ids[0, start:, None])[:, 0].cpu()


def head_of(model: Any) -> Head:
    """How the model turns hidden states into logits; verified at start by `Policy.check_packing`."""
    output = model.get_output_embeddings()
    config = model.config
    scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(getattr(config, "logits_scaling", 1.0) or 1.0)
    return Head(
        weight=output.weight,
        bias=output.bias,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
