"""Runs untrusted Python: isolated, limited, deterministic, fast. Linux, standard library only.

    with Sandbox() as sandbox:
        sandbox.run([Job("def f(x): return x + 1", ("1", "2"))])   # [[Outcome("ok", "2", ""), Outcome("ok", "3", "")]]

Imports nothing outside of this folder.
"""

from . import literal
from .outcomes import Job, Outcome
from .pool import Sandbox, SandboxError
from .profiles import BENCHMARK, PROPOSAL, Profile

__all__ = ["BENCHMARK", "Job", "Outcome", "PROPOSAL", "Profile", "Sandbox", "SandboxError", "literal"]
