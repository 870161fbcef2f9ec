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
from transformers.modeling_outputs import ModelOutput

from model.checkpoint.pretrained import ReleasedLayout
from model.config import MoEConfig
from model.experts import Experts
from model.layer import Block
from model.loss import IGNORED, cross_entropy
from model.moe import Gate, Routing
from model.mtp import PredictionModule, ahead
from model.rope import angles, frequencies, rotation_scale
from model.router import loads


@dataclass
class MoEOutput(ModelOutput):
    """Of the decoder (last_hidden_state) or of the whole model (logits, loss).

    balance_loss: α Σ_layers Σ_documents Σ_i f_i P_i / documents (V3 report, eq. 17), 0 outside training; already in
        `loss`. mtp_loss: mean over depths of the cross-entropies of tokens further ahead (eq. 24), times λ in `loss`.
    mtp_hidden: per depth k, normed states [B, S, C] whose product with the head's weight predicts token i+k+1.
    mtp_state: what the first prediction module reads of this model, [B, S, C].
    document_T: each token's document, -1 for padding. routing: which experts each token met, by layer
        of the main model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    balance_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_hidden: Any = None
    mtp_state: Tensor | None = None
    document_T: Tensor | None = None
    routing: Any = None


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
    """Embedding, layers and final norm.

    While training it counts each expert's tokens and sums the entropy of the routers: see `model.balance`.
    """

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The prediction modules stand behind the main layers: so they are named in the released files.
        depth = config.num_hidden_layers
        predictions = range(depth, depth + config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(
            [*(Block(config, i) for i in range(depth)), *(PredictionModule(config, i) for i in predictions)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        shape = (len(self.layers), config.n_routed_experts)
        self.load_LE = nn.Buffer(torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.entropy_L = nn.Buffer(torch.zeros(len(self.layers), dtype=torch.float64), persistent=False)
        # float32 also when the model is built in another type: rounded frequencies turn far positions wrong.
        self.frequency = nn.Buffer(torch.zeros(config.qk_rope_head_dim // 2, dtype=torch.float32), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def prediction_modules(self) -> list[PredictionModule]:
        return [layer for layer in self.layers if isinstance(layer, PredictionModule)]

    @property
    def expert_layers(self) -> list[int]:
        """Of the main model."""
        return list(range(self.config.first_k_dense_replace, self.config.num_hidden_layers))

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Also the rotary frequencies: what is not in a checkpoint."""
        self.load_LE.zero_()
        self.entropy_L.zero_()
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
        mtp: bool = False,
        mtp_apart: bool = False,
        **kwargs: Any,
    ) -> MoEOutput:
        """position_ids that restart at 0 pack documents, which then see nothing of each other (no cache, no mask).

        routing: layer -> expert indices [T, K] to use instead of choosing. mtp: also `mtp_hidden` (without a cache);
        mtp_apart: without gradient to the main model. A `layout` among kwargs is for an attention function that knows
        from it who sees whom; then documents are looked at only where training needs them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        with_layout = "layout" in kwargs
        packed = not with_layout and position_ids is not None and bool((position_ids[:, 1:] == 0).any())
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
        if not with_layout:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_BSC,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        documents = Routing(chosen=dict(routing or {}))
        if self.training or mtp or not with_layout:
            documents.document_T, documents.documents = _documents(position_ids, attention_mask, x_BSC)
        rotation = self._rotation(position_ids, x_BSC.dtype)
        attention = {"rotation": rotation, "attention_mask": mask, "past_key_values": past_key_values, **kwargs}
        balance = x_BSC.new_zeros((), dtype=torch.float32)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x_BSC, part = layer(x_BSC, documents, **attention)
            balance = balance + part
        hidden = self.norm(x_BSC)
        mtp_hidden: list[Tensor] = []
        mtp_state = state = hidden if self.config.mtp_hidden == "after" else x_BSC
        if mtp:
            if input_ids is None or past_key_values is not None:
                raise ValueError("mtp needs input_ids, and no cache")
            assert documents.document_T is not None
            for k, module in enumerate(self.prediction_modules, start=1):
                later = self.embed_tokens(ahead(input_ids, documents.document_T, k, fill=0))
                if mtp_apart:
                    later, state = later.detach(), state.detach() if k == 1 else state
                state, part = module(state, later, documents, **attention)
                balance = balance + part
                mtp_hidden.append(module.shared_head.norm(state))
        if self.training:
            self._count(documents)
        return MoEOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            balance_loss=self.config.seq_aux_alpha * balance / max(1, documents.documents),
            mtp_hidden=mtp_hidden,
            mtp_state=mtp_state,
            document_T=documents.document_T,
            routing={i: chosen for i, chosen in documents.chosen.items() if i < self.config.num_hidden_layers},
        )

    def predict(
        self, state_BSC: Tensor, next_ids_BS: Tensor, position_ids: Tensor, layout: Any
    ) -> tuple[Tensor, Tensor]:
        """For a sampler's drafts: the first prediction module on states of tokens i and the ids of tokens i+1.

        Returns its own states (which stand for the main model's, one token further, where drafts go on) and the normed
        ones, whose product with the head's weight predicts tokens i+2.
        """
        module = self.prediction_modules[0]
        rotation = self._rotation(position_ids, state_BSC.dtype)
        state, _ = module(state_BSC, self.embed_tokens(next_ids_BS), Routing(), rotation=rotation, layout=layout)
        return state, module.shared_head.norm(state)

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return angles(position_ids, self.frequency, rotation_scale(self.config.rope_parameters), dtype)

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        """Here, outside what is recomputed: each token counts once."""
        assert routing.document_T is not None
        real = routing.document_T >= 0
        for layer, index_TK in routing.chosen.items():
            self.load_LE[layer] += loads(index_TK[real], self.config.n_routed_experts)
            self.entropy_L[layer] += routing.entropy[layer]


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


class MoEForCausalLM(MoEPreTrainedModel, ReleasedLayout, GenerationMixin):
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
        mtp: bool = False,
        **kwargs: Any,
    ) -> MoEOutput:
        """logits [B, S, V]; with labels also the loss: the mean cross-entropy of next tokens (never those of another
        document), plus the balance loss and, in training, λ times the multi-token prediction loss. (The trainers go
        through the decoder instead, and never make all logits.)"""
        predicting = self.training and labels is not None and bool(self.config.mtp_loss_weight)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if predicting else use_cache,
            mtp=mtp or (predicting and self.config.num_nextn_predict_layers > 0),
            **kwargs,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = self.lm_head(hidden[:, kept])
        if labels is not None:
            assert out.document_T is not None
            out.loss = self._cross_entropy(hidden, labels, out.document_T, 1) + out.balance_loss
            if predicting and out.mtp_hidden:
                further = [
                    self._cross_entropy(h, labels, out.document_T, k + 1) for k, h in enumerate(out.mtp_hidden, start=1)
                ]
                out.mtp_loss = torch.stack(further).mean()
                out.loss = out.loss + self.config.mtp_loss_weight * out.mtp_loss
        out.last_hidden_state = None
        return out

    def _cross_entropy(self, hidden_BSC: Tensor, labels_BS: Tensor, document_T: Tensor, offset: int) -> Tensor:
        target = ahead(labels_BS, document_T, offset, fill=IGNORED)
        return cross_entropy(hidden_BSC.flatten(0, 1), self.lm_head.weight, target.flatten())
