"""The feed-forward halves of a layer: a dense SwiGLU, or shared and routed experts (V3 report, section 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MoEConfig
from model.experts import Experts
from model.router import affinities, choose_experts, gate_weights, router_entropy, sequence_balance


@dataclass
class Routing:
    """What one forward of the whole model routes where.

    chosen: layer -> indices [T, K]. A layer that finds its indices here uses them, and only the weights come from live
        affinities: so recomputed activations meet the experts that they met the first time, and indices recorded
        at rollout can be replayed in training (put them here before the forward).
    document_T: each token's document, -1 for padding, for the sequence-wise loss; None where only outputs count.
    """

    document_T: Tensor | None = None
    documents: int = 1
    chosen: dict[int, Tensor] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)  # layer -> `router_entropy` of its tokens, in training


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(channels, inner, bias=False)
        self.up_proj = nn.Linear(channels, inner, bias=False)
        self.down_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router's weights and balancing biases; the rules are functions in `model.router`."""

    def __init__(self, experts: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, channels))
        # float32 always: it moves by steps of 0.001. Changed by `balance.update_biases`, never by a gradient.
        self.e_score_correction_bias = nn.Buffer(torch.zeros(experts, dtype=torch.float32))


class MixtureOfExperts(nn.Module):
    """Shared experts see every token, each of the routed ones only its tokens."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.gate = Gate(config.n_routed_experts, config.hidden_size)
        self.experts = Experts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.expert_products
        )
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_TC: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """(output [T, C], Σ f_i P_i of the sequence-wise loss, a scalar without α)."""
        config = self.config
        s_TE = affinities(x_TC, self.gate.weight, config.scoring_func)
        index_TK = routing.chosen.get(self.layer_idx)
        if index_TK is None:
            index_TK = routing.chosen[self.layer_idx] = choose_experts(
                s_TE,
                self.gate.e_score_correction_bias,
                k=config.num_experts_per_tok,
                groups=config.n_group or 1,
                kept_groups=config.topk_group or 1,
                method=config.topk_method,
            )
        elif index_TK.shape != (len(x_TC), config.num_experts_per_tok):
            raise ValueError(
                f"layer {self.layer_idx}: routing of shape {tuple(index_TK.shape)} for {len(x_TC)} tokens of "
                f"{config.num_experts_per_tok} experts each"
            )
        weight_TK = gate_weights(
            s_TE, index_TK, normalise=bool(config.norm_topk_prob), scale=config.routed_scaling_factor
        )
        out = self.experts(x_TC, index_TK, weight_TK) + self.shared_experts(x_TC)
        if not self.training or routing.document_T is None:
            return out, s_TE.new_zeros(())
        if self.layer_idx not in routing.entropy:  # else this is a recomputation
            routing.entropy[self.layer_idx] = router_entropy(s_TE.detach()[routing.document_T >= 0])
        if not config.seq_aux_alpha:
            return out, s_TE.new_zeros(())
        balance = sequence_balance(s_TE, index_TK, routing.document_T, routing.documents, counts=config.seq_aux_counts)
        return out, balance
