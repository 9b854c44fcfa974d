"""A CUDA card pretended on the CPU: tensors that say they are on cuda:0, a memory that can run out, graphs.

    with PretendedCard(memory=50_000_000) as card:
        policy = on_card(Policy.load(..., device="cpu"), max_batch=20)     # a copy
        policy.generate(...)                     # takes every CUDA branch, computes real numbers
    card.waits, card.captures, card.live

- Tensors. An `OnCard` wraps a CPU tensor. Operations run on what it wraps; one that mixes it with a CPU tensor of more
  than one number is refused, as CUDA refuses it.
- Waits. What would make the host wait for a GPU is counted by name, and refused under capture.
- Memory. Bytes of all storages that a tensor on the card refers to. What was freed stays reserved until
  `torch.cuda.empty_cache()`, so that `mem_get_info` says what a caching allocator would; fragments do not exist.
- Graphs. A capture records the operations and the storages they wrote to; a replay runs them again and writes the
  results to the same storages. What was not captured by address, such as a number that Python computed, stays as it
  was, as it does in a CUDA graph.

Left out: autograd, streams (there is one, in order), several cards, pinned memory, kernels that exist for GPUs only.
"""

import contextlib
import copy
from collections import Counter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from azr.policy.policy import Policy
from operations import WAITS, name_of, tensors_in

CARD = torch.device("cuda", 0)
COPIES = ("_to_copy", "copy_")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")


class HostWait(RuntimeError):
    """The host waits for the device while a graph is captured."""


class Use:
    """One tensor's claim on the bytes of a storage; they are in use until the last claim is gone."""

    def __init__(self, card: "PretendedCard", storage):
        self.card, self.address, self.size = card, storage.data_ptr(), storage.nbytes()
        self.counted = False
        if self.address not in card.users:
            if card.live + self.size > card.memory:
                raise torch.OutOfMemoryError(f"CUDA out of memory (pretended): {self.size} bytes, {card.live} in use")
            card.live += self.size
            card.reserved, card.peak = max(card.reserved, card.live), max(card.peak, card.live)
        card.users[self.address] += 1
        self.counted = True

    def __del__(self):
        if not self.counted:
            return
        self.card.users[self.address] -= 1
        if not self.card.users[self.address]:
            del self.card.users[self.address]
            self.card.live -= self.size


class OnCard(torch.Tensor):
    """A tensor that says it is on the card; its numbers are in `held`, a CPU tensor of the same shape and strides."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, use: Use):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )

    def __init__(self, held: torch.Tensor, use: Use):
        self.held, self.use = held, use

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the pretended card, outside of `with PretendedCard()`")

    # a wrapper has no storage of its own
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def storage_offset(self) -> int:
        return self.held.storage_offset()

    def tolist(self):  # refused for wrappers
        return self.cpu().tolist()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "OnCard") -> None:
        self.held, self.use = other.held, other.use


class PretendedCard(TorchDispatchMode):
    """See the module. memory: bytes there are; live, peak: bytes in use, now and at most; waits: operation -> times;
    captures: operations in each graph; sent: bytes from the host."""

    def __init__(self, memory: int = 1 << 40):
        super().__init__()
        self.memory, self.live, self.reserved, self.peak = memory, 0, 0, 0
        self.users: Counter[int] = Counter()  # address of a storage -> tensors that refer to it
        self.waits, self.captures, self.tape = Counter(), [], None
        self.sent = 0
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        for patched in self._patches():
            self.stack.enter_context(patch.object(*patched))
        # torch.tensor(..., device="cuda") is made on the CPU and moved, as under a FakeTensorMode
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        try:
            return super().__exit__(*error)
        finally:
            self.stack.close()

    def _patches(self):
        attention = F.scaled_dot_product_attention  # picks its kernel by asking the driver
        yield F, "scaled_dot_product_attention", lambda *args, **kwargs: self._run(attention, args, kwargs)
        cuda = torch.cuda
        yield cuda, "_lazy_init", lambda: None
        yield cuda, "is_available", lambda: True
        yield cuda, "current_device", lambda: 0
        yield cuda, "mem_get_info", lambda device=None: (self.memory - self.reserved, self.memory)
        yield cuda, "get_per_process_memory_fraction", lambda device=None: 1.0
        yield cuda, "memory_allocated", lambda device=None: self.live
        yield cuda, "memory_reserved", lambda device=None: self.reserved
        yield cuda, "empty_cache", self._empty_cache
        yield cuda, "synchronize", lambda device=None: self._wait("torch.cuda.synchronize")
        yield cuda, "graph_pool_handle", lambda: (0, 1)
        yield cuda, "CUDAGraph", Graph
        yield cuda, "graph", self._capture
        yield cuda, "Stream", Stream
        yield cuda, "current_stream", Stream
        yield cuda, "stream", lambda stream: contextlib.nullcontext()

    # -- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._run(func, args, kwargs or {})

    def _run(self, func, args, kwargs):
        name, given = name_of(func), tensors_in((args, kwargs))
        wanted = kwargs.get("device") and torch.device(kwargs["device"]).type
        if wanted != "cuda" and not any(isinstance(t, OnCard) for t in given):
            return func(*args, **kwargs)
        self._check_devices(name, given)
        to_host = wanted == "cpu" or (name == "copy_" and not isinstance(given[0], OnCard))
        if to_host or name in WAITS or _by_mask(name, args):
            self._wait(name)
        if name in COPIES and not to_host:
            self.sent += sum(t.numel() * t.element_size() for t in given if not isinstance(t, OnCard))
        wrapped = {id(t.held): t for t in given if isinstance(t, OnCard)}
        args, kwargs = _held(args), {key: _held(value) for key, value in kwargs.items()}
        if wanted:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)  # on CPU tensors
        if self.tape is not None and not getattr(func, "is_view", False) and name not in EMPTY:
            self.tape.append((func, args, kwargs, tensors_in(out)))
        return out if to_host else self._wrap(out, wrapped)

    def _check_devices(self, name: str, given) -> None:
        """CUDA takes CPU tensors of no dimension beside its own, and any in a copy."""
        if name in COPIES:
            if self.tape is not None and any(not isinstance(t, OnCard) and t.dim() for t in given):
                raise HostWait(f"{name} from the host while a graph is captured")
        elif mixed := [t for t in given if not isinstance(t, OnCard) and t.dim()]:
            raise RuntimeError(f"{name}: tensors on cuda:0 and a CPU tensor of shape {tuple(mixed[0].shape)}")

    def _wait(self, name: str) -> None:
        if self.tape is not None:
            raise HostWait(f"{name} while a graph is captured: the host would wait for the device")
        self.waits[name] += 1

    # -- memory

    def _wrap(self, out, wrapped: dict):
        """The result of an operation, its tensors on the card. wrapped: id of what an argument holds -> argument."""
        if isinstance(out, (list, tuple)):
            return type(out)([self._wrap(part, wrapped) for part in out])
        if not isinstance(out, torch.Tensor):
            return out
        if id(out) in wrapped:  # an operation in place gives back the tensor it was given
            return wrapped[id(out)]
        return OnCard(out, Use(self, out.untyped_storage()))

    def _empty_cache(self) -> None:
        self.reserved = self.live

    # -- graphs

    @contextlib.contextmanager
    def _capture(self, graph, pool=None, **options):
        self.tape = []
        try:
            yield
            graph.tape = self.tape
            self.captures.append(len(self.tape))
        finally:
            self.tape = None


def _by_mask(name: str, args) -> bool:
    """Is it x[mask], whose shape depends on the mask?"""
    masks = tensors_in(args[1]) if name in ("index", "index_put_") else []
    return any(t.dtype in (torch.bool, torch.uint8) for t in masks)


def _held(tree):
    """The same with CPU tensors in place of those on the card."""
    if isinstance(tree, OnCard):
        return tree.held
    return type(tree)(map(_held, tree)) if type(tree) in (list, tuple) else tree


class Graph:
    """What `torch.cuda.CUDAGraph()` gives."""

    def __init__(self):
        self.tape = []

    def replay(self) -> None:
        with _disable_current_modes():
            for func, args, kwargs, written in self.tape:
                for old, new in zip(written, tensors_in(func(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    """All work is in order, so a stream is a name."""

    def __init__(self, *ignored, **options):
        pass

    def wait_stream(self, other) -> None:
        pass


def on_card(policy: Policy, **engine_options) -> Policy:
    """A copy of the policy with parameters and buffers on the card; call it inside of `with PretendedCard()`."""
    model = copy.deepcopy(policy.model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = torch.nn.Parameter(parameter.data.to(CARD), requires_grad=parameter.requires_grad)
            setattr(module, name, moved)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(CARD))
    if policy.base.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return Policy(model, policy.tokenizer, policy.info, policy.eos_ids, **engine_options)
