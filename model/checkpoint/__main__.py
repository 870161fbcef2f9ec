"""`python -m model.checkpoint export-fp8 IN OUT` and `... dequantise IN OUT`, shard by shard, on the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.checkpoint.export import SHARD, dequantise, export_fp8
from model.checkpoint.files import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint", description=__doc__)
    parser.add_argument("command", choices=["export-fp8", "dequantise"])
    parser.add_argument("source", metavar="IN", help="a folder, or a repository of the hub (org/name)")
    parser.add_argument("target", metavar="OUT", type=Path, help="a folder that is new or empty")
    parser.add_argument("--max-shard-size", default=SHARD, help="of a file, such as 5GB (the default)")
    parser.add_argument("--revision", help="of the repository")
    given = parser.parse_args(arguments)
    convert = export_fp8 if given.command == "export-fp8" else dequantise
    try:
        convert(_folder(given.source, given.revision), given.target, given.max_shard_size)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1:
        raise CheckpointError(f"{source} is no folder, and no repository of the hub (org/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision))


if __name__ == "__main__":
    sys.exit(main())
