"""Can the GPU of this machine be used, and if not, what to type: one line instead of days on a CPU.

    if why := why_unusable(look()):          # facts -> None, or what is wrong and what to do
    if why := why_no_four_bit():             # the same of bitsandbytes' library

`why_unusable` is a function of its arguments alone, so that every machine can be tested on any. Importing this needs no
torch. Left out: Windows, ROCm beyond what torch itself says, several cards (the first one is used). Imports two helpers
that read files and run commands from azr/isolated.py; with that file beside it, it can be copied out.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
from dataclasses import dataclass

from ..isolated import output_of, read_text

PINNED = "2.13.0"  # torch of requirements.txt
PYTORCH = "https://download.pytorch.org/whl"
# What the driver must be for a CUDA major version (NVIDIA: its minor versions are compatible), and which cards the
# builds of that torch have kernels for (PYTORCH_RELEASES_CODE_CC in torch/cuda/__init__.py).
DRIVERS = ((580, 13), (525, 12))
BUILDS = (("cu130", 13, (7, 5), (99, 0)), ("cu126", 12, (5, 0), (9, 9)))
HINTS = {
    "802": "the fabric manager of its NVSwitch does not run: start nvidia-fabricmanager",
    "803": "driver and its library differ in version: reboot after the driver's update",
    "804": "the container's CUDA library is newer than the machine's driver",
}


@dataclass(frozen=True)
class Facts:
    """What torch and the system say about the GPU."""

    torch: str  # its version, such as 2.13.0+cu130
    cuda: str | None = None  # what it was built for; None: for CPUs, or for ROCm
    rocm: bool = False
    error: str | None = None  # what torch.cuda.init() raised; None: it found a GPU
    driver: str | None = None  # NVIDIA's, such as 550.54.15; None: there is none, or nobody asked
    visible: str | None = None  # CUDA_VISIBLE_DEVICES; None: not set
    name: str = ""
    capability: tuple[int, int] | None = None
    kernels: tuple[str, ...] = ()  # torch.cuda.get_arch_list()


def look() -> Facts:
    """The facts of this machine. Initialises CUDA; what torch raises becomes `error`, and its warnings are silenced."""
    import torch

    error = name = capability = None
    kernels: tuple[str, ...] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
            name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            kernels = tuple(torch.cuda.get_arch_list())
        except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as raised:
            error = str(raised) or type(raised).__name__
    return Facts(
        torch.__version__,
        torch.version.cuda,
        torch.version.hip is not None,
        error,
        driver_version(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        name or "",
        capability,
        kernels,
    )


def driver_version() -> str | None:
    """The version of the NVIDIA driver, such as 550.54.15, asked without torch; None if there is none."""
    # Containers often lack one of the two: the file belongs to the kernel module, the command to the user's libraries.
    text = read_text("/proc/driver/nvidia/version") or output_of(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text or "")
    return version[0] if version else None


# ------------------------------------------------------------------------------------------------------- the decision


def why_unusable(facts: Facts) -> str | None:
    """None if torch can compute on this GPU; else one line: what is wrong, and what to type."""
    if facts.error is None:
        if facts.rocm or not facts.kernels or has_kernels(facts.capability, facts.kernels):
            return None
        card = f"{facts.name} (compute capability {facts.capability[0]}.{facts.capability[1]})"
        return f"torch {facts.torch} has no kernels for {card}, only for {' '.join(facts.kernels)}: {_build(facts)}"
    if facts.cuda is None and not facts.rocm:
        if facts.driver is None:
            return f"this torch is a CPU build ({facts.torch}), and there is no NVIDIA driver"
        return f"this torch is a CPU build ({facts.torch}), but there is a driver, {facts.driver}: {_build(facts)}"
    return _why_no_start(facts)


def _why_no_start(facts: Facts) -> str:
    """What torch's own error means, for a torch that was built for GPUs."""
    reason = f"torch says: {_short(facts.error)}"
    # A hidden card and a missing driver can both be true; the driver's error then says more.
    if facts.visible in ("", "-1") and "driver" not in reason:
        return f"{reason}; CUDA_VISIBLE_DEVICES is {facts.visible!r} and hides it: unset CUDA_VISIBLE_DEVICES"
    code = re.search(r"Error (\d+)", reason)
    hint = HINTS.get(code[1]) if code else None
    reason += f" ({hint})" if hint else ""
    if "too old" in reason or (code and code[1] == "804"):
        return f"{reason}: {_build(facts)}"
    if "no NVIDIA driver" in reason:
        return f"{reason}; in a container the card must be handed in (docker run --gpus all)"
    return f"{reason}; nvidia-smi must list the card"


def has_kernels(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """Whether kernels built for these targets (`sm_90`, `compute_90`) run on a card of this compute capability.

    Machine code (sm) runs on cards of its major version and the same or a later minor one, PTX (compute) on all later
    cards, where the driver compiles it (CUDA C++ programming guide, application compatibility).
    """
    for target in filter(None, (re.match(r"(sm|compute)_(\d+)(\d)", each) for each in kernels)):
        built = int(target[2]), int(target[3])
        if built <= capability and (target[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def newest_cuda(facts: Facts) -> int | None:
    """The CUDA major version that the driver can run; None if nothing tells."""
    # torch's "driver too old" error names CUDA's version as 12040 for 12.4.
    if match := re.search(r"found version (\d+)", facts.error or ""):
        return int(match[1]) // 1000
    if facts.driver is None:
        return None
    return next((cuda for oldest, cuda in DRIVERS if int(facts.driver.split(".")[0]) >= oldest), 11)


def _build(facts: Facts) -> str:
    """The command that installs a torch for this driver and this card, or which driver it takes."""
    cuda, card = newest_cuda(facts) or 99, facts.capability  # nothing known of the driver: the newest build
    if card and card < (5, 0):
        return "no current torch has: take a newer card"
    for tag, needed, oldest, newest in BUILDS:
        if cuda >= needed and (card is None or oldest <= card <= newest):
            return f"pip install torch=={PINNED}+{tag} --index-url {PYTORCH}/{tag}"
    least = 580 if card and card >= (10, 0) else 525  # Blackwell (10.0 and later) has builds for CUDA 13 alone
    return f"update the NVIDIA driver to {least} or newer (580 for the torch of requirements.txt)"


def _short(text: str) -> str:
    """The first sentence, or CUDA's own error with its number, on one line."""
    text = " ".join(text.split())
    if match := re.search(r"Error \d+: [^.]*", text):
        return f"cudaGetDeviceCount, {match[0]}"
    return text.split(". ")[0].removesuffix(".")[:200]


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def why_no_four_bit() -> str | None:
    """None if bitsandbytes can compute on the GPU that torch has; else one line that says what to type."""
    import torch

    logger = logging.getLogger("bitsandbytes.cextension")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # at import it prints a traceback of what is one line here
    try:
        library = importlib.import_module("bitsandbytes.cextension").lib
        if getattr(library, "compiled_with_cuda", False) or torch.version.hip is not None:
            return None
        # Not getattr: the library's stand-in answers to every name, with a function that raises.
        error = vars(library).get("error_msg") or "it has only its library for CPUs"
    except (ImportError, OSError, AttributeError, RuntimeError) as raised:
        error = str(raised) or type(raised).__name__
    finally:
        logger.setLevel(level)
    cure = "pip install -U bitsandbytes"
    if "BNB_CUDA_VERSION" in os.environ:
        cure = "unset BNB_CUDA_VERSION"
    elif "cannot open shared object" in error:
        cure = "install torch again with pip, which brings CUDA's libraries"
    return (
        f"bitsandbytes cannot compute on the GPU, for CUDA {torch.version.cuda} ({error.splitlines()[0]}): {cure}, "
        "or --quantization none, if the model fits unquantized"
    )
