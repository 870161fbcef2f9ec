"""The tables of docs/fp8_training.md: errors, memory and sampler/trainer mismatch of FP8 layers, on the CPU in seconds.

    python benchmarks/fp8_layers.py

Errors: norm of the difference to bfloat16 over the norm, on random data whose rows and columns differ in size.
Memory: what autograd keeps of a forward pass besides parameters. Mismatch: a tiny mixture of experts with random
weights; the trainer scores what was drawn by a sampler that has its weights as exported, and meets the same experts.
"""

from __future__ import annotations

import copy

import common
import torch
from torch import Tensor, nn

from model import MoEConfig, MoEForCausalLM
from model.experts import Experts
from model.fp8.convert import to_fp8
from model.moe import SwiGLU
from rl.objective import mismatch
from rl.policy.moe import ExpertTraining
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.recipe import RLMoESpec
from rl.rollout import LocalSampler, SamplingParams

DTYPE = torch.bfloat16


class Routed(nn.Module):
    """Experts with a routing of their own, chosen once for all. Its weights are trained, as those of a gate are."""

    def __init__(self, tokens: int, experts: int, k: int, channels: int, inner: int):
        super().__init__()
        self.experts = Experts(experts, channels, inner)
        self.index_TK = torch.rand(tokens, experts).topk(k).indices
        self.affinity_TK = nn.Parameter(torch.empty(tokens, k))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index_TK, self.affinity_TK.float().sigmoid())


class Two(nn.Module):
    """Two projections of one input."""

    def __init__(self, channels: int):
        super().__init__()
        self.a, self.b = nn.Linear(channels, 192, bias=False), nn.Linear(channels, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def uneven(*shape: int) -> Tensor:
    return (torch.randn(shape) * torch.randn(*shape[:-1], 1).exp() * torch.randn(shape[-1])).to(DTYPE)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module with uneven weights in bfloat16, and the same in FP8."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(uneven(*parameter.shape) * parameter.shape[-1] ** -0.5)
    plain = module.to(DTYPE)
    fp8 = copy.deepcopy(plain)
    to_fp8(fp8)
    return plain, fp8


def errors(module: nn.Module, tokens: int, channels: int) -> list[str]:
    """Of output, input gradient and weight gradients."""
    x, found = uneven(tokens, channels), []
    dy = torch.empty(0)
    for candidate in pair(module):
        given = x.clone().requires_grad_()
        y = candidate(given)
        dy = dy if len(dy) else uneven(*y.shape)
        found.append([y.detach(), *torch.autograd.grad(y, [given, *candidate.parameters()], dy)])
    pairs = zip(*found, strict=True)
    return [f"{float((b.double() - a.double()).norm() / a.double().norm()):.1%}" for a, b in pairs]


def kept(module: nn.Module, tokens: int, channels: int) -> list[str]:
    """Bytes a token, in bfloat16 and in FP8."""
    x, found = uneven(tokens, channels), []
    for candidate in pair(module):
        own = {p.untyped_storage().data_ptr() for p in candidate.parameters()}
        alive: dict[int, Tensor] = {}

        def keep(tensor: Tensor, own: set[int] = own, alive: dict[int, Tensor] = alive) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                alive.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            candidate(x.clone().requires_grad_())
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in alive.values()) / tokens)
    return [f"{found[0]:,.0f}", f"{found[1]:,.0f}", f"{found[1] / found[0]:.0%}"]


def mixture(seed: int) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(MoEConfig.preset("tiny", initializer_range=0.05, num_nextn_predict_layers=0)).eval()


@torch.no_grad()
def disagreement(dtype: torch.dtype, fp8: bool, rounding: torch.dtype | None = torch.bfloat16) -> list[str]:
    """Mean k3 and largest difference of log-probabilities, in nats. rounding: of what the trainer quantises."""
    trainer, sampler = mixture(0), mixture(1)
    in_fp8: list[str] = []
    if fp8:
        in_fp8 = to_fp8(trainer, weight_rounding=rounding).converted
        to_fp8(sampler)
    for name, parameter in trainer.named_parameters():  # what is not in FP8 is the same on both sides
        if not name.startswith(tuple(f"{layer}." for layer in in_fp8)):
            parameter.copy_(parameter.to(DTYPE))
    local = LocalSampler(sampler, _NoEnd(), record_routing=True)
    local.update_weights(((name, p.to(DTYPE)) for name, p in trainer.named_parameters()), 1)
    for model in (trainer, sampler):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    prompts = torch.randint(3, 512, (8, 12)).tolist()
    rows = local.generate(prompts, SamplingParams(n=1, max_tokens=16, seed=0))
    samples = [row[0] for row in rows]
    documents = [
        Document(prompt, s.token_ids, group=i, routed=torch.from_numpy(s.routed_experts))
        for i, (prompt, s) in enumerate(zip(prompts, samples, strict=True))
    ]
    policy = Policy(trainer, experts=ExpertTraining(trainer, RLMoESpec(), 1))
    (pack,) = policy.pack(documents, 10_000)
    logp, _ = policy.logprobs(pack)
    found = mismatch(logp, pack.gather([s.logprobs for s in samples]))
    return [f"{float(found['k3']) / len(logp):.0e}", f"{float(found['max']):.1g}"]


class _NoEnd:
    eos_token_id = None


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    linear = nn.Linear(512, 384, bias=False)
    rows = [
        ["linear, 640 tokens, 512 → 384", errors(nn.Sequential(linear), 640, 512)],
        ["SwiGLU, 300 tokens, 256 → 256 → 256", errors(SwiGLU(256, 256), 300, 256)],
        ["8 experts, 4 a token, 256 → 128 → 256", errors(Routed(300, 8, 4, 256, 128), 300, 256)],
    ]
    columns = ["", "output", "input's gradient", "weights' gradients"]
    print(common.markdown_table(columns, [[name, e[0], e[1], ", ".join(e[2:])] for name, e in rows]), "\n")
    memory = [
        ["linear, 896 inputs", *kept(nn.Sequential(nn.Linear(896, 192, bias=False)), 256, 896)],
        ["two with the same input", *kept(Two(896), 256, 896)],
        ["SwiGLU, 896 → 2,304 → 896", *kept(SwiGLU(896, 2304), 256, 896)],
        ["16 experts, 8 a token, 896 → 256 → 896", *kept(Routed(256, 16, 8, 896, 256), 256, 896)],
    ]
    print(common.markdown_table(["bytes a token", "bfloat16", "FP8", ""], memory), "\n")
    differences = [
        ["float32, not in FP8", *disagreement(torch.float32, fp8=False)],
        ["float32, both quantise the export", *disagreement(torch.float32, fp8=True)],
        ["float32, the trainer quantises its masters", *disagreement(torch.float32, fp8=True, rounding=None)],
        ["bfloat16, not in FP8", *disagreement(torch.bfloat16, fp8=False)],
        ["bfloat16, FP8", *disagreement(torch.bfloat16, fp8=True)],
    ]
    print(common.markdown_table(["", "KL a token, nats", "largest difference"], differences))


if __name__ == "__main__":
    main()
