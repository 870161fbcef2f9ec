"""Checkpoints in the released layout of DeepSeek-V3: reading, writing, FP8. `MoEForCausalLM` loads and saves them;
`python -m model.checkpoint` converts folders."""

from model.checkpoint.export import dequantise, export_fp8, save_fp8
from model.checkpoint.files import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "dequantise", "export_fp8", "save_fp8"]
