"""What an update of a rollout worker costs, by each transport.

    python benchmarks/weight_sync.py [--millions 135] [--rounds 3] [--python INTERPRETER --engine vllm]

A Llama of about that many parameters in bfloat16, one worker on this host, the same weights each time; the median of
the rounds. Seconds are those of `sync/seconds`: from the trainer's first tensor to the worker's acknowledgement.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from rl.policy.load import character_tokenizer, model_from
from rl.rollout.make import spool_folder
from rl.rollout.probe import probe_tokens
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.launch import WorkerProcess, write_secret
from rl.rollout.workers.transfer import Spool


def llama(millions: float, vocabulary: int) -> torch.nn.Module:
    """Layers of hidden size 576 (3.5 million parameters each) as many as it takes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=max(1, round(millions / 3.54)),
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return model_from(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=135)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--engine", choices=("local", "vllm"), default="local")
    parser.add_argument("--python", help="interpreter of vLLM's environment")
    given = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="weight-sync-"))
    tokenizer = character_tokenizer()
    model = llama(given.millions, len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    spool = Spool(spool_folder(None, folder, bytes_), given.bucket_mb << 20)
    secret = write_secret(folder / "secret")
    process = WorkerProcess(
        0, folder, engine=given.engine, model=str(folder / "model"), secret_file=folder / "secret", host="127.0.0.1",
        port=0, bucket_folder=spool.folder, python=given.python, env={}, cores=None, options={"dtype": "bfloat16"},
    )  # fmt: skip
    worker = Worker(WorkerClient(process.url, secret, deadline_s=600.0), process)
    probe = Probe(probe_tokens(len(tokenizer)), tolerance=1.0)
    fleet = Fleet([worker], spool, probe, FleetSettings("files", say=print))
    try:
        fleet.start()
        print(f"{bytes_ / 1e6:.0f} MB of weights, {given.engine} engine, buckets of {given.bucket_mb} MiB")
        version = 0
        for transport in ("files", "http", "collective"):
            fleet.settings.transport = transport
            seconds = []
            for _ in range(given.rounds):
                version += 1
                seconds.append(fleet.update(model.named_parameters(), version).seconds)
            median = statistics.median(seconds)
            print(f"{transport:<12} {median:7.2f} s   {bytes_ / 1e6 / median:7.0f} MB/s")
    finally:
        fleet.close()


if __name__ == "__main__":
    main()
