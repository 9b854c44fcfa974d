"""Every weight trained, without an adapter: fp32 masters beside half-precision weights, checkpoints, the base beneath.

    full = FullWeights(model, trained=True)                  # from now on every weight gets a gradient
    optimizer = torch.optim.AdamW(full.masters.values(), lr=1e-6)
    optimizer.register_step_post_hook(lambda *_: full.round())
    full.save(directory, model, tokenizer)                   # what AutoModelForCausalLM.from_pretrained reads

In fp32 the weights themselves are trained. In bf16 and fp16 the modules compute with the rounded weights and AdamW
steps fp32 masters, which are rounded into the weights after each step (Micikevicius et al. 2018, arXiv 1710.03740,
section 3.1): a step of 1e-6 is less than half the distance between two bf16 numbers around most weights, and without
masters these would never move. What is unchanged in bf16 after training is thus partly a matter of that rounding.

A checkpoint that is opened to be measured lies over its base like an adapter: the base's values are kept on the CPU and
put back for as long as `base()` is entered. Left out: parameters that are no floating-point numbers, several GPUs.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .load import fill
from .opening import ModelError

FILE = "model.safetensors"
# of the embedded model: what this repository reads besides the weights (export copies them too)
COPIED = ("base.json", "tokenizer_check.json")


class FullWeights:
    """The weights of a model, tied ones once, by their names: `weights` are computed with, `masters` are stepped."""

    def __init__(self, model, trained: bool):
        self.weights: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.masters = self.weights
        self.untrained: dict[str, torch.Tensor] | None = None  # the base's values, where a checkpoint lies over them
        if trained:
            model.requires_grad_(True)
            self.masters = {name: master_of(p) for name, p in self.weights.items()}

    @classmethod
    def over_base(cls, model, checkpoint: Path) -> "FullWeights":
        """The weights of a checkpoint put into its base, which `base()` gives back. ModelError: not of this model."""
        full = cls(model, trained=False)
        full.untrained = full.state()
        full.load(read_weights(checkpoint), str(checkpoint))
        return full

    @property
    def rounds(self) -> bool:
        """Whether there are masters besides the weights."""
        return self.masters is not self.weights and any(m is not p for m, p in self.pairs())

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter]]:
        """(master, weight) of every weight."""
        return zip(self.masters.values(), self.weights.values())

    @torch.no_grad()
    def round(self) -> None:
        """After a step of the optimizer: the weights become their masters, rounded to the dtype of computation."""
        for master, weight in self.pairs():
            if master is not weight:
                weight.copy_(master)

    def state(self, device="cpu") -> dict[str, torch.Tensor]:
        """Copies of the masters by name; device None: where they are."""
        return {name: p.detach().to(device or p.device, copy=True) for name, p in self.masters.items()}

    def load(self, state: dict[str, torch.Tensor], origin: str = "this state") -> None:
        """Writes these values into the masters and the weights; ModelError, which names `origin`: not of this model."""
        fill(self.masters, state, origin, "weights of another model")
        self.round()

    @contextmanager
    def base(self):
        """Within it the weights are those of the base that the checkpoint lies over. ModelError: none is kept."""
        if self.untrained is None:
            raise ModelError("a run of --train full keeps no copy of its base, which this asks for; take --train lora")
        tuned = self.state(device=None)
        self.load(self.untrained)
        try:
            yield
        finally:
            self.load(tuned)

    def save(self, directory: Path, model, tokenizer, state: dict[str, torch.Tensor] | None = None) -> None:
        """A plain model directory, weights in the dtype of computation; state: what `state` gave at some time."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        state = self.state() if state is None else state
        rounded = {name: value.to(self.weights[name].dtype).contiguous() for name, value in state.items()}
        save_file(rounded, directory / FILE, metadata={"format": "pt"})
        model.config.save_pretrained(directory)
        if (generation := getattr(model, "generation_config", None)) is not None:
            # not save_pretrained, which refuses settings that published models have
            (directory / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
        tokenizer.save_pretrained(directory)
        for file in (Path(model.name_or_path) / name for name in COPIED):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def master_of(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """The fp32 parameter that is stepped for a weight: itself, or a copy that gets each backward pass's gradient."""
    if weight.dtype == torch.float32:
        return weight
    master = torch.nn.Parameter(weight.detach().float())
    weight.register_post_accumulate_grad_hook(partial(hand_over, master))
    return master


def hand_over(master: torch.nn.Parameter, weight: torch.nn.Parameter) -> None:
    """Adds the gradient of a weight to its master's in fp32 and frees it: micro-batches are summed in fp32, and of the
    half-precision gradients only one exists at a time."""
    gradient, weight.grad = weight.grad, None  # first: memory may run out below, and the attempt is then repeated
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint on the CPU, as stored. ModelError: they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(checkpoint / FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {checkpoint} cannot be read: {error}") from error
