"""What both pretended devices need to know of PyTorch's operations."""

import torch

# operations after which the host needs a number, or a shape, that only the device has
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave",
}


def tensors_in(tree) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


def name_of(func) -> str:
    """ "add" of aten::add.Tensor."""
    return func._schema.name.split("::")[1] if hasattr(func, "_schema") else func.__name__
