"""`MoEForCausalLM`: the DeepSeek-V3 transformer as a `PreTrainedModel`, so that every tool takes it as any other.

B rows, S tokens, C channels, V vocabulary, T = B·S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from model.config import ARCHITECTURE, MoEConfig
from model.experts import Experts
from model.mla import MultiHeadLatentAttention
from model.moe import Gate, MixtureOfExperts, Routing, SwiGLU
from model.rope import angles, frequencies, rotation_scale
from model.router import loads


@dataclass
class MoEOutput(ModelOutput):
    """Of the decoder (last_hidden_state) or of the whole model (logits, loss).

    balance_loss: α Σ_layers Σ_documents Σ_i f_i P_i / documents (V3 report, eq. 17), 0 outside training; already in
        `loss`. routing: which experts each token met.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    balance_loss: Tensor | None = None
    routing: Any = None


class Block(GradientCheckpointingLayer):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config, layer_idx)
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BSC: Tensor, routing: Routing, **attention: Any) -> tuple[Tensor, Tensor]:
        """([B, S, C], this layer's part of the sequence-wise loss)."""
        x_BSC = x_BSC + self.self_attn(self.input_layernorm(x_BSC), **attention)
        normed = self.post_attention_layernorm(x_BSC)
        if isinstance(self.mlp, SwiGLU):
            return x_BSC + self.mlp(normed), x_BSC.new_zeros((), dtype=torch.float32)
        out_TC, balance = self.mlp(normed.flatten(0, 1), routing)
        return x_BSC + out_TC.view_as(x_BSC), balance


class MoEPreTrainedModel(PreTrainedModel):
    config: MoEConfig
    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with standard deviation `initializer_range` (V3 report, section 4.2: 0.006); norms 1, biases 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Gate):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, Decoder):
            module.reset_statistics()


class Decoder(MoEPreTrainedModel):
    """Embedding, layers and final norm. Counts each expert's tokens while training (see `model.balance`)."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        shape = (config.num_hidden_layers, config.n_routed_experts)
        self.load_LE = nn.Buffer(torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.frequency = nn.Buffer(torch.zeros(config.qk_rope_head_dim // 2), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Also the rotary frequencies: what is not in a checkpoint."""
        self.load_LE.zero_()
        self.frequency.copy_(frequencies(self.config.qk_rope_head_dim, self.config.rope_parameters))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: dict[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> MoEOutput:
        """position_ids that restart at 0 pack documents, which then see nothing of each other (no cache, no mask).

        routing: layer -> expert indices [T, K] to use instead of choosing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        packed = position_ids is not None and bool((position_ids[:, 1:] == 0).any())
        if packed:
            if past_key_values is not None or attention_mask is not None:
                raise ValueError("packed documents (position_ids that restart) take no cache and no attention_mask")
            use_cache = False
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(x_BSC.shape[1], device=x_BSC.device)[None] + seen
        mask = None
        if "layout" not in kwargs:  # an attention function that takes a layout knows who sees whom
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_BSC,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        rotation = angles(position_ids, self.frequency, rotation_scale(self.config.rope_parameters), x_BSC.dtype)
        documents = Routing(*_documents(position_ids, attention_mask, x_BSC), dict(routing or {}))
        balance = x_BSC.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x_BSC, part = layer(
                x_BSC,
                documents,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            balance = balance + part
        if self.training:
            self._count(documents)
        return MoEOutput(
            last_hidden_state=self.norm(x_BSC),
            past_key_values=past_key_values,
            balance_loss=self.config.seq_aux_alpha * balance / max(1, documents.documents),
            routing=documents.chosen,
        )

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        """Here, outside what is recomputed: each token counts once."""
        real = routing.document_T >= 0
        for layer, index_TK in routing.chosen.items():
            self.load_LE[layer] += loads(index_TK[real], self.config.n_routed_experts)


def _documents(position_ids: Tensor, attention_mask: Tensor | None, x_BSC: Tensor) -> tuple[Tensor, int]:
    """(document of each of the T tokens, their number): a row, or part of one, that starts at position 0."""
    batch, length = x_BSC.shape[:2]
    starts = (position_ids == 0).expand(batch, length).clone()
    starts[:, 0] = True
    document = starts.flatten().cumsum(0) - 1
    count = int(document[-1]) + 1
    if attention_mask is not None and attention_mask.dim() == 2:
        # Padding on the left has position 0 or 1 by convention: a document is then a row.
        row = torch.arange(batch, device=x_BSC.device)[:, None].expand(batch, length)
        document = row.masked_fill(attention_mask[:, -length:] == 0, -1).flatten()
        count = batch
    return document, count


# Files hold one tensor per expert, memory holds one for all: transformers converts on the way in and out, once it is
# told that our class is of that kind.
register_checkpoint_conversion_mapping(
    "MoEForCausalLM", get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoEOutput:
        """logits [B, S, V]; with labels also the mean cross-entropy of the next tokens plus the balance loss."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            loss = loss + out.balance_loss
        return MoEOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            balance_loss=out.balance_loss,
            routing=out.routing,
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As any PreTrainedModel; but config.json names the architecture that transformers and vLLM know."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = [ARCHITECTURE]
            self.config.save_pretrained(save_directory)
