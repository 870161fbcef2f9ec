"""What a mixture of experts of our own adds to training: balance, multi-token prediction, replayed routing.

The mathematics is in `model/`; here its terms are summed so that a loss is the same for every split into micro-batches
and processes: sums over a pack, divided by what the whole batch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl.policy.logprobs import Head, token_logprobs
from rl.policy.packing import Pack
from rl.recipe import MoESpec
from rl.recipe_io import RecipeError

NOT_RECORDED = (
    "moe.replay_routing: the sampler did not record which experts tokens met, so training chooses them anew (what "
    "records them: docs/vllm.md); false says that it may"
)


class Auxiliary(NamedTuple):
    """Of one pack, as sums."""

    balance: Tensor  # α Σ over documents and layers of Σ_i f_i P_i (V3 report, eq. 17)
    mtp: Tensor  # Σ over targets of -log p, mean over depths (eq. 24 and 25 without λ and 1/T), in nats


class ExpertTraining:
    """Of one model: the two further losses, and the update of its biases after each optimizer update."""

    def __init__(self, model: Any, spec: MoESpec, total_updates: int):
        self.model, self.spec, self.total_updates = model, spec, total_updates
        depth = len(model.base_model.prediction_modules)
        if spec.mtp_loss and not depth:
            raise RecipeError(
                "moe.mtp_loss: the model has no multi-token prediction module (num_nextn_predict_layers is 0): "
                "set it to 0"
            )
        model.config.seq_aux_alpha, model.config.mtp_loss_weight = spec.sequence_loss, spec.mtp_loss

    @classmethod
    def of(cls, model: Any, spec: MoESpec, total_updates: int, given: bool) -> ExpertTraining | None:
        """None for a model that is no mixture of experts of ours; `given`: the recipe speaks of one."""
        if hasattr(model.base_model, "prediction_modules"):
            return cls(model, spec, total_updates)
        if given:
            raise RecipeError(
                f"moe: the model is a {model.config.model_type}, not a deepseek_v3, so these settings mean nothing; "
                "remove them"
            )
        return None

    @property
    def whole_documents(self) -> bool:
        """Both losses are defined on documents: a prompt is then not shared among the completions of its group."""
        return bool(self.spec.sequence_loss or self.spec.mtp_loss)

    def inputs(self) -> dict[str, Any]:
        """What the decoder's forward is asked for, besides its states."""
        return {"mtp": True, "mtp_apart": self.spec.mtp_apart} if self.spec.mtp_loss else {}

    @contextmanager
    def counting(self, counts: bool) -> Iterator[None]:
        """Within it, tokens count in the experts' loads or (those of an idle pack) do not."""
        decoder = self.model.base_model
        kept = None if counts else (decoder.load_LE.clone(), decoder.entropy_L.clone())
        yield
        if kept is not None:
            decoder.load_LE.copy_(kept[0])
            decoder.entropy_L.copy_(kept[1])

    def auxiliary(self, out: Any, batch: Pack, head: Head) -> Auxiliary:
        """From the decoder's output of a training forward of this pack."""
        # An idle pack has no documents; its one segment is multiplied by 0.
        balance = out.balance_loss * (len(batch.segments) if batch.documents else 0)
        if not self.spec.mtp_loss:
            return Auxiliary(balance, balance.new_zeros(()))
        if self.spec.mtp_apart:
            head = head._replace(weight=head.weight.detach())
        total = balance.new_zeros(())
        for k, hidden in enumerate(out.mtp_hidden, start=1):
            # What predicts a target at depth 0 stands one token before it; at depth k, k tokens earlier still.
            has = batch.position_ids[batch.predictor_P] >= k
            place = (batch.predictor_P[has] - k).to(hidden.device)
            logp, _ = token_logprobs(hidden[0, place], batch.target_P[has].to(hidden.device), head)
            total = total - logp.sum() / len(out.mtp_hidden)
        return Auxiliary(balance, total)

    def loss(self, auxiliary: Auxiliary, tokens: float, documents: float) -> Tensor:
        """tokens, documents: of the whole batch, over all micro-batches and processes."""
        return self.spec.mtp_loss * auxiliary.mtp / max(1.0, tokens) + auxiliary.balance / max(1.0, documents)

    def log(self, sums: dict[str, float], auxiliary: Auxiliary, tokens: float, documents: float) -> None:
        """Adds the two losses of a pack, as they enter the loss but for λ."""
        values = {"balance_loss": auxiliary.balance / documents}
        if self.spec.mtp_loss:
            values["mtp_loss"] = auxiliary.mtp / tokens
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())

    def updated(self, updates_done: int) -> dict[str, Any]:
        """After each optimizer update: moves the biases by the loads since the last one, summed over processes."""
        from model.balance import update_biases

        before_stop = updates_done <= self.spec.bias_until * self.total_updates
        return update_biases(self.model, self.spec.bias_speed if before_stop else 0.0)


def replayed(batch: Pack, model: Any, device: torch.device) -> dict[int, Tensor] | None:
    """layer -> the experts [T, K] that the sampler chose for each packed token, if the pack carries them.

    RecipeError: they are not of this model's layers and experts.
    """
    if batch.routed_TLK is None:
        return None
    layers, config = model.base_model.expert_layers, model.config
    found, wanted = tuple(batch.routed_TLK.shape[1:]), (len(layers), config.num_experts_per_tok)
    routed = batch.routed_TLK.to(torch.long)
    inside = not routed.numel() or (int(routed.min()) >= 0 and int(routed.max()) < config.n_routed_experts)
    if found != wanted or not inside:
        raise RecipeError(
            f"moe.replay_routing: the sampler recorded {found[-1]} experts a token in {found[0]} layers, numbered up "
            f"to {int(routed.max()) if routed.numel() else 0}; the model has experts in {wanted[0]} layers, "
            f"{wanted[1]} of {config.n_routed_experts} a token: set it to false, or have the sampler run this model"
        )
    routed = routed.to(device)
    return {layer: routed[:, i] for i, layer in enumerate(layers)}
