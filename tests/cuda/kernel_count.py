"""Counts what a GPU would be asked to do: kernels, the bytes they read and write, waits of the host, device by device.

    with KernelCount() as count:
        ...
    count.kernels_on("h100"), count.bytes_on("h100"), count.waits, count.strays

An operation that writes counts as one launch, whatever torch makes of it inside (a sort is several); views and
allocations are none. bitsandbytes' 4-bit product is one or four, by its own rule for the card. Bytes are those of the
tensors that go in and come out, once each: what a cache keeps between two kernels is not seen. Of a table that is
looked up in, the rows looked up count.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from four_bit_rule import UNPACKED, launches
from operations import WAITS, name_of, tensors_in

NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
    "_reshape_alias",
    "resize_",
    "set_",
}
LOOK_UP = {"embedding", "index", "index_select", "gather"}
WRITE_ONLY = {
    "fill_",
    "zero_",
    "zeros",
    "ones",
    "full",
    "zeros_like",
    "ones_like",
    "full_like",
    "arange",
    "new_zeros",
    "new_full",
    "scalar_tensor",
}
PRODUCT = "4-bit product"


class KernelCount(TorchDispatchMode):
    """kernels, bytes: operation -> number, 4-bit products left out, which depend on the card: kernels_on, bytes_on.
    waits: operations that make the host wait; strays: operations with a result on another device than `device`."""

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device
        self.kernels, self.bytes = Counter(), Counter()
        self.products: Counter[tuple] = Counter()  # (dtype, rows, outputs, inputs, block, bytes in and out) -> times
        self.waits: list[str] = []
        self.strays: list[str] = []

    def kernels_on(self, card: str) -> Counter:
        """Launches by operation. card: a key of four_bit_rule.CARDS."""
        return self.kernels + self._products(lambda count, size: count, card)

    def bytes_on(self, card: str) -> Counter:
        return self.bytes + self._products(lambda count, size: size, card)

    def _products(self, of, card: str) -> Counter:
        total = Counter()
        for (dtype, rows, outputs, inputs, block, size), times in self.products.items():
            count, weights = launches(card, dtype, rows, outputs, inputs), outputs * inputs
            if count == UNPACKED:  # weights are written and read unpacked; so are their scales in fp32, twice
                size += 2 * weights * dtype.itemsize + 4 * 4 * weights // block
            total[PRODUCT] += times * of(count, size)
        return total

    def add(self, label: str, size: float) -> None:
        self.kernels[label] += 1
        self.bytes[label] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            self.waits.append("is it true?")  # a fake tensor does not know: yes
            return True
        return self._counted(func, args, kwargs, func(*args, **kwargs))

    def _counted(self, func, args, kwargs, out):
        if func.namespace == "prim":  # asks a tensor what it is
            return out
        name, given, made = name_of(func), tensors_in((args, kwargs)), tensors_in(out)
        on_device = any(t.device.type == self.device for t in given + made)
        if name in WAITS or self._to_host(name, given, made):
            self.waits.append(str(func))
        elif on_device and any(t.device.type != self.device for t in made):
            self.strays.append(f"{func} -> {[str(t.device) for t in made]}")
        if not on_device or name in NO_LAUNCH or func.is_view:
            return out
        if name == "gemm_4bit":
            x, (outputs, inputs) = args[0], args[2]
            size = _size(given) + _size(made)
            self.products[x.dtype, x.numel() // inputs, outputs, inputs, args[4], size] += 1
        else:
            self.add(_label(name, given, made), _bytes(name, args, given, made))
        return out

    def _to_host(self, name: str, given, made) -> bool:
        if self.device == "cpu" or name not in ("_to_copy", "copy_"):
            return False
        return made[0].device.type == "cpu" and any(t.device.type == self.device for t in given)


def scaled(one: KernelCount, two: KernelCount, layers: int) -> KernelCount:
    """The count of a model of so many layers, from those of a model of one and of two: a layer adds the difference."""
    whole = KernelCount(one.device)
    for name in ("kernels", "bytes", "products"):
        a, b = getattr(one, name), getattr(two, name)
        getattr(whole, name).update({key: a[key] + (layers - 1) * (b[key] - a[key]) for key in a | b})
    whole.waits = one.waits + (layers - 1) * two.waits[len(one.waits) :]
    whole.strays = one.strays + two.strays
    return whole


def _label(name: str, given, made) -> str:
    if name == "_to_copy" and given[0].device != made[0].device:
        return "copy between host and device"
    if name == "_to_copy":
        return f"cast {_short(given[0].dtype)} to {_short(made[0].dtype)}"
    if name in ("mm", "addmm", "addmm_", "bmm"):
        return f"{name} {_short(given[-1].dtype)}"
    return name


def _bytes(name: str, args, given, made) -> float:
    if name in LOOK_UP:
        return 2 * _size(made) + _size(t for t in given[1:] if not t.is_floating_point())
    if name == "index_put_":
        return 2 * _size(args[2:3]) + _size(given[1:-1])
    if name == "copy_":
        return _size(given[1:2]) + _size(made)
    if name in WRITE_ONLY:
        return _size(made)
    return _size(given) + _size(made)


def _size(tensors) -> int:
    """Bytes; of a tensor that repeats its elements (expanded), those that exist."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
