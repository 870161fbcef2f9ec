"""Peak memory and time of an update under each trainer backend.

The same scratch model and the same random documents in two processes on CPU, one accelerate configuration after
another. Memory is the largest resident one of process 0 over updates after the first, without what interpreter and
libraries hold; it includes activations and gathered layers, not the copy that a sharded backend keeps to sample from.
DeepSpeed's backends are left out where it is not installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import common_arguments, machine, markdown_table, peak_memory, write_json

ROOT = Path(__file__).parent.parent
BACKENDS = {
    "DDP": "cpu-2", "ZeRO-1": "zero1-cpu-2", "ZeRO-2": "zero2-cpu-2", "FSDP2": "fsdp2-cpu-2", "ZeRO-3": "zero3-cpu-2",
    "ZeRO-3 offloaded": "zero3-offload-cpu-2",
}  # fmt: skip


def resident() -> float:
    """GiB held now; what was freed is given back first, and the high-water mark starts anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def measure(settings: dict[str, int], result: Path) -> None:
    """One process of one backend."""
    sys.path.insert(0, str(ROOT))
    import torch

    from rl.policy.backend import load_backend
    from rl.policy.load import character_tokenizer, model_from, scratch_config
    from rl.policy.packing import Document
    from rl.policy.policy import Policy
    from rl.policy.processes import Processes
    from rl.recipe import OptimizerSpec
    from rl.recipe_model import ScratchModel

    torch.set_num_threads(settings["threads"])
    processes = Processes()
    hidden = settings["hidden"]
    scratch = ScratchModel(hidden_size=hidden, intermediate_size=3 * hidden, layers=settings["layers"], heads=8)
    torch.manual_seed(0)
    before = resident()
    model = model_from(scratch_config(scratch, character_tokenizer())).eval()
    parameters = sum(p.numel() for p in model.parameters())
    backend = load_backend(model, torch.float32, OptimizerSpec(), processes, samples=False)
    policy = Policy(model, execution=backend.execution)
    generator = torch.Generator().manual_seed(processes.rank)
    documents = [Document(ids[:32], ids[32:]) for ids in torch.randint(90, (8, 128), generator=generator).tolist()]
    seconds = []
    for update in range(1 + settings["updates"]):
        if update == 1:
            resident()
        start = time.perf_counter()
        for pack in backend.micro_batches(policy.pack(documents, 512)):
            backend.backward(-policy.logprobs(pack)[0].sum() / 1000)
        backend.step(1e-4)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory()
    if processes.rank == 0:
        found = {"parameters": parameters, "GiB": peak - before, "seconds": min(seconds[1:])}
        result.write_text(json.dumps(found))
    processes.barrier()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(config: str, settings: dict[str, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"),
            "--main_process_port", str(free_port()),
            __file__, "--worker", json.dumps({**settings, "result": str(result)}),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        found: dict[str, float] = json.loads(result.read_text())
        print(config, found, file=sys.stderr)
        return found


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    arguments = parser.parse_args()
    if arguments.worker:
        settings = json.loads(arguments.worker)
        return measure(settings, Path(settings["result"]))
    settings = {name: getattr(arguments, name) for name in ("hidden", "layers", "updates", "threads")}
    with_deepspeed = importlib.util.find_spec("deepspeed") is not None
    found = {
        name: launch(BACKENDS[name], settings)
        for name in arguments.backends
        if with_deepspeed or not name.startswith("ZeRO")
    }
    rows = [
        [name, f"{r['GiB']:.2f}", f"{r['GiB'] * 2**30 / r['parameters']:.1f}", f"{r['seconds']:.2f}"]
        for name, r in found.items()
    ]
    count = int(next(iter(found.values()))["parameters"])
    print(f"{count:,} parameters in float32, 2 processes\n")
    print(markdown_table(["backend", "peak GiB a process", "bytes a parameter", "s an update"], rows))
    write_json(arguments.json, {"machine": machine(arguments.threads), "settings": settings, "results": found})


if __name__ == "__main__":
    main()
