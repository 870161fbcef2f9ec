"""`MoEConfig`: the shape of a DeepSeek-V3 model, under Hugging Face's field names, with presets."""

from __future__ import annotations

from typing import Any, Literal

from transformers import DeepseekV3Config

# What transformers' DeepseekV3Config does not name itself, with the values of DeepSeek-V3.
_DEFAULTS: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "seq_aux_alpha": 1e-4,
    "seq_aux_counts": "affinity",
    "mtp_loss_weight": 0.3,
    "mtp_hidden": "after",
    "expert_products": "grouped",
}
_CHOICES = {
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    "seq_aux_counts": ("affinity", "routed"),
    "mtp_hidden": ("after", "before"),
    "expert_products": ("grouped", "loop"),
}
# What V2's files leave unsaid.
_V2: dict[str, Any] = {
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "num_nextn_predict_layers": 0,
}  # fmt: skip

_YARN_V3 = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeek-V3 (arXiv 2412.19437, section 4.2) as released.
    "671b": {"max_position_embeddings": 163840, "rope_parameters": _YARN_V3, "num_nextn_predict_layers": 1},
    # The small configuration that was released with V3's code: DeepSeek-V2-Lite's shape and routing. Moonlight has the
    # same layers with V3's routing; its own config.json says so when a checkpoint is loaded.
    "16b": {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": None, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "scoring_func": "softmax",
        "topk_method": "greedy", "max_position_embeddings": 163840, "num_nextn_predict_layers": 0,
        "rope_parameters": {**_YARN_V3, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    # Every mechanism of the big one at a size that trains on two cores.
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_nextn_predict_layers": 1,
    },
}  # fmt: skip


class MoEConfig(DeepseekV3Config):
    """transformers' DeepseekV3Config and, besides its fields:

    scoring_func: "sigmoid" (V3) or "softmax" (V2) affinities of tokens to experts.
    topk_method: "noaux_tc" (V3: groups by the sum of their two best, biases choose), "group_limited_greedy" (V2: groups
        by their best) or "greedy".
    seq_aux_alpha: weight α of the sequence-wise balance loss; 0 leaves it out.
    seq_aux_counts: its f_i count the top-K of the bare affinities, as in the report, or the experts "routed" to.
    mtp_loss_weight: λ of the multi-token prediction loss (the report: 0.3, then 0.1); 0: the modules do not train.
    mtp_hidden: whether these modules read the main model's states "after" or "before" its final norm.
    expert_products: "grouped" (one grouped product over tokens sorted by expert) or "loop" (the reference).

    `config.json` stays one that transformers and vLLM read: of type deepseek_v3, or deepseek_v2 for softmax.
    """

    def __init__(self, **fields: Any):
        # It tells how files store the weights; a loaded model is not quantised. The loader sees it in the files.
        if fields.pop("quantization_config", None) is not None and not {"dtype", "torch_dtype"} & fields.keys():
            fields["dtype"] = "bfloat16"
        if fields.pop("model_type", None) == "deepseek_v2":
            fields = {**_V2, **fields}
        ours = {name: fields.pop(name, default) for name, default in _DEFAULTS.items()}
        for name, allowed in _CHOICES.items():
            if ours[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {ours[name]!r}")
        super().__init__(**fields, **ours)
        self.architectures = [self.architecture]
        self._check()

    @property
    def architecture(self) -> str:
        """The name that the released files and other engines (transformers, vLLM) know it by."""
        return "DeepseekV2ForCausalLM" if self.scoring_func == "softmax" else "DeepseekV3ForCausalLM"

    def to_dict(self) -> dict[str, Any]:
        """As in config.json. The instance itself is of type deepseek_v3 always."""
        return {**super().to_dict(), "model_type": "deepseek_v2" if self.scoring_func == "softmax" else "deepseek_v3"}

    @classmethod
    def preset(cls, name: Literal["671b", "16b", "tiny"], **changes: Any) -> MoEConfig:
        """A published shape, with fields changed as given."""
        if name not in _PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are: {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], **changes})

    @property
    def latent_values_per_token(self) -> int:
        """Numbers that a layer's cache holds for one token: the latent and the rotated key shared by all heads."""
        return int(self.kv_lora_rank) + int(self.qk_rope_head_dim)

    def _check(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group or 1
        if experts % groups:
            raise ValueError(f"n_group: {groups} groups do not divide n_routed_experts = {experts}")
        kept = self.topk_group or 1
        if not 1 <= kept <= groups:
            raise ValueError(f"topk_group: {kept} of n_group = {groups} groups cannot be kept")
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ValueError("topk_method: noaux_tc scores a group by its two best experts; groups here have one")
        if self.num_experts_per_tok > kept * (experts // groups):
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} experts cannot be chosen from topk_group = {kept} "
                f"groups of {experts // groups}"
            )
