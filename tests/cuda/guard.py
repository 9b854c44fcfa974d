"""Lets PyTorch make tensors that say they are on a CUDA device, on a machine that has none.

Such tensors (fake ones, or wrappers of CPU tensors) enter C++ code that asks for a guard of their device. A build for
CPUs has none for CUDA, and a build for CUDA has one that asks the driver. Two lines of C++ register PyTorch's own
guard that does nothing; they are compiled against the headers that come with torch, once a process.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


@functools.cache
def why_no_guard() -> str | None:
    """Register the guard, once; None if it is there now, else why it cannot be, in one line."""
    if torch.cuda.is_available():
        return "a real CUDA device is here, whose guard must not be replaced: the GPU's own tests run instead"
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        return "no g++ and no clang++, which build the device guard of the pretended card (apt-get install g++)"
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "guard.cpp"), Path(directory, "guard.so")
        source.write_text(SOURCE)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source)]
        command += [f"-L{home / 'lib'}", "-lc10", "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            lines = [line for line in built.stderr.splitlines() if "error" in line] or built.stderr.splitlines()
            return f"{compiler} cannot build the device guard of the pretended card: {' '.join(lines[:1])}"
        ctypes.CDLL(str(library))  # stays loaded when its file is gone
    return None
