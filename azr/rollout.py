"""The policy: a frozen base in 4 bits (or not), live fp32 LoRA on top, and the two things self-play asks of it.

    policy = Policy.load("Qwen/Qwen2.5-Coder-3B", quantization="nf4", lora=LoraSettings(rank=32))
    completions = policy.generate([policy.encode(prompt)], 8, Sampling(max_new_tokens=512), seeds=[range(8)])
    for indices, log_prob, entropy, mask in policy.score(prompts, responses, with_grad=True): ...

Sampling (engine.py) and scoring use the same modules: nothing is copied, merged or synchronised. Full logits are never
held: log-probs and entropies come from chunks of response positions and are recomputed in the backward pass.

Left out: several GPUs, trained heads or embeddings, encoder-decoder and sliding-window models.
"""

import hashlib
import json
import logging
import math
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

from azr.engine import Completion, Engine, Sampling
from azr.hub import only_cached

__all__ = ["ChunkedLogProb", "Completion", "LoraSettings", "ModelError", "Policy", "Sampling", "Scored"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# settings of a config that change the logits after the head, which the chunked scoring does not know
UNSUPPORTED_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class ModelError(ValueError):
    """The model or the adapter cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 32
    alpha: float = 64  # the update is (alpha / rank) B A
    targets: str = "all-linear"  # "all-linear" | "attention"


class Scored(NamedTuple):
    """One micro-batch of `Policy.score`; the first field says which samples its rows are."""

    indices: list[int]  # (batch,)
    log_prob: torch.Tensor  # (batch, time) fp32, 0 where there is no token
    entropy: torch.Tensor  # (batch, time) fp32, nats, of the full distribution at the given temperature
    mask: torch.Tensor  # (batch, time) bool


# --------------------------------------------------------------------------------------------- log-probs and entropy


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 logits (rows, vocabulary) = hidden (rows, H) times weight (vocabulary, H), accumulated and kept in fp32."""
    if hidden.dtype == torch.float32 and weight.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


class ChunkedLogProb(torch.autograd.Function):
    """log p(target) and entropy of softmax(hidden W^T / T) without ever holding all the logits.

    apply(hidden (N, H), weight (V, H), target (N,), temperature, chunk) -> log_prob (N,), entropy (N,), both fp32.

    Saved for backward: hidden, weight, target, logsumexp. Backward recomputes z = hidden W^T / T in chunks of rows:
        d log p(y) / dz_j = [j = y] - p_j          d H / dz_j = -p_j (log p_j + H)
    and multiplies by W / T. W is frozen: it gets no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature=1.0, chunk=128):
        count = hidden.shape[0]
        log_prob, entropy, log_z = (torch.empty(count, device=hidden.device) for _ in range(3))
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            z = head_logits(hidden[rows], weight).div_(temperature)
            log_z[rows] = torch.logsumexp(z, -1)
            log_prob[rows] = z.gather(-1, target[rows, None]).squeeze(-1) - log_z[rows]
            entropy[rows] = _entropy(z.sub_(log_z[rows, None]))
        ctx.save_for_backward(hidden, weight, target, log_z)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        hidden, weight, target, log_z = ctx.saved_tensors
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            log_p = head_logits(hidden[rows], weight).div_(ctx.temperature).sub_(log_z[rows, None])
            if grad_entropy is not None:
                p = log_p.exp()
                dz = log_p.sub_((p * log_p).sum(-1, keepdim=True)).mul_(p).mul_(-grad_entropy[rows, None])
                if grad_log_prob is not None:
                    dz.sub_(p.mul_(grad_log_prob[rows, None]))
            else:
                dz = log_p.exp_().mul_(-grad_log_prob[rows, None])
            if grad_log_prob is not None:
                dz.scatter_add_(-1, target[rows, None], grad_log_prob[rows, None])
            grad_hidden[rows] = head_logits(dz, weight.t()).div_(ctx.temperature)
        return grad_hidden, None, None, None, None


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last axis; overwrites its argument."""
    p = log_p.exp()
    return -(p.mul_(log_p)).sum(-1)


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: rows x longest row <= token_budget, save for one row."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# ------------------------------------------------------------------------------------------------------------ policy


class Policy:
    """A causal language model with LoRA; make one with `Policy.load`."""

    def __init__(self, model, tokenizer, info: dict, eos_ids: set[int], **engine_options):
        self.model, self.tokenizer, self.info = model, tokenizer, info
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base = base
        self.backbone, self.head = base.base_model, base.get_output_embeddings()
        self.device = self.head.weight.device
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids, default=0)
        self._checkpointing = False  # are activations recomputed?
        self.engine = Engine(
            self.backbone, lambda hidden: head_logits(hidden, self.head.weight), base.config, tokenizer, eos_ids,
            pad_id=self.pad_id, **engine_options,
        )

    @classmethod
    def load(cls, model, quantization="nf4", lora: LoraSettings | None = None, adapter=None, dtype=None, device=None,
             seed: int = 0, revision: str | None = None, **engine_options) -> "Policy":
        """Load a hub id or a directory; put new LoRA (`lora`) or a saved adapter (`adapter`) on it, or neither.

        quantization: "nf4" (double quantization, blocks of 64; embeddings and head stay as they are) or "none".
        dtype: of computation and of what is not quantized; default bf16 on CUDA, fp32 on CPU. LoRA is always fp32; the
        same seed gives the same A. engine_options: max_batch, cache_bytes, prefill_tokens. Raises ModelError.
        """
        if lora is not None and adapter is not None:
            raise ModelError("give new LoRA settings or a saved adapter, not both: an adapter brings its own settings")
        if quantization not in ("nf4", "none"):
            raise ModelError(f"quantization must be nf4 or none, not {quantization!r}")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        name = str(model)
        with _quiet():
            where = _where(name, revision)
            config = _load_config(name, where)
            tokenizer = _load_tokenizer(name, where)
            base = _load_base(name, where, quantization, dtype, device)
            eos_ids = _eos_ids(base, tokenizer)
            info = {
                "base_model": name,
                "revision": _revision(name, config),
                **_quantization_info(base),
                "dtype": str(dtype).removeprefix("torch."),
                "tokenizer_hash": tokenizer_hash(tokenizer),
                "lora": None,
            }
            if adapter is not None:
                base, info["lora"] = _load_adapter(base, Path(adapter))
            elif lora is not None:
                base, info["lora"] = _new_lora(base, lora, name, seed)
        return cls(base, tokenizer, info, eos_ids, **engine_options)

    # -- text

    def encode(self, text: str) -> list[int]:
        """Token ids of the text and nothing else: no BOS, no EOS, no chat template."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, special tokens included, EOS and padding left out."""
        drop = self.eos_ids | {self.tokenizer.pad_token_id}
        kept = [i for i in ids if i not in drop]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- sampling and scoring

    def generate(self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds) -> list[list[Completion]]:
        """n completions of each prompt from the current weights; seeds[i][j], 64 bits, decides sample j of prompt i.

        See engine.py. ValueError: an empty or over-long prompt, seeds of another shape.
        """
        training = self.model.training
        self.model.eval()
        try:
            return self.engine.generate(prompt_ids, n, sampling, [list(row) for row in seeds])
        finally:
            self.model.train(training)

    def score(self, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0,
              token_budget: int = 8192, with_grad: bool = False, chunk: int = 128) -> Iterator[Scored]:
        """Log-prob and entropy of every response token, micro-batch by micro-batch, longest samples first.

        Right-padded, no attention mask; rows x longest row <= token_budget. Call backward on each micro-batch before
        asking for the next one. Empty responses give rows without tokens. ValueError: an empty prompt.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0 to score, not {temperature}")
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise ValueError(f"prompt {empty[0]} is empty; a prompt needs at least one token")
        return self._score(prompts, responses, temperature, token_budget, with_grad, chunk)

    def _score(self, prompts, responses, temperature, token_budget, with_grad, chunk) -> Iterator[Scored]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
        self.model.train(with_grad)
        for indices in micro_batches(lengths, token_budget):
            # no `yield` inside: the caller's grad mode must not change between micro-batches
            with torch.set_grad_enabled(with_grad):
                scored = self._score_batch(
                    indices, [prompts[i] for i in indices], [responses[i] for i in indices], temperature, chunk
                )
            yield scored

    def _score_batch(self, indices, prompts, responses, temperature, chunk) -> Scored:
        length = max(len(p) + len(r) for p, r in zip(prompts, responses))
        time = max(len(r) for r in responses)
        ids = torch.full((len(indices), length), self.pad_id)
        mask = torch.zeros(len(indices), time, dtype=torch.bool)
        position, target = [], []  # flat index of the hidden state that predicts a token; the token
        for row, (p, r) in enumerate(zip(prompts, responses)):
            ids[row, : len(p) + len(r)] = torch.tensor(p + r)
            mask[row, : len(r)] = True
            start = row * length + len(p) - 1
            position.extend(range(start, start + len(r)))
            target.extend(r)
        ids, mask = ids.to(self.device), mask.to(self.device)
        position = torch.tensor(position, dtype=torch.int64, device=self.device)
        target = torch.tensor(target, dtype=torch.int64, device=self.device)
        # no mask: with right padding causal attention never reads it, and SDPA keeps its fast causal kernel
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[position]
        log_prob, entropy = ChunkedLogProb.apply(hidden, self.head.weight, target, temperature, chunk)
        padded = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (log_prob, entropy)]
        return Scored(indices, padded[0], padded[1], mask)

    def score_lists(self, prompts, responses, temperature: float = 1.0, token_budget: int = 8192):
        """As `score` without gradient: (log-probs, entropies), each a list of floats per sample, in order."""
        log_probs: list[list[float]] = [[] for _ in prompts]
        entropies: list[list[float]] = [[] for _ in prompts]
        for indices, log_prob, entropy, _ in self.score(prompts, responses, temperature, token_budget):
            log_prob, entropy = log_prob.tolist(), entropy.tolist()
            for row, i in enumerate(indices):
                log_probs[i] = log_prob[row][: len(responses[i])]
                entropies[i] = entropy[row][: len(responses[i])]
        return log_probs, entropies

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute each layer in the backward pass of `score(with_grad=True)` instead of keeping its activations."""
        if on == self._checkpointing:
            return
        self._checkpointing = on
        new = hasattr(self.base, "activation_checkpointing_enable")  # newer transformers renamed it
        prefix = "activation_checkpointing" if new else "gradient_checkpointing"
        if on:
            getattr(self.base, f"{prefix}_enable")(**{f"{prefix}_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.base, f"{prefix}_disable")()

    # -- the adapter

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices, fp32, in a fixed order; empty without LoRA."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def disable_adapter(self):
        """Context in which the policy is its base model."""
        return self.model.disable_adapter() if self.info["lora"] else nullcontext()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Copies of the LoRA matrices on the CPU under PEFT's names (what adapter_model.safetensors holds)."""
        if not self.info["lora"]:
            return {}
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _adapter_tensors(self.model).items()}

    def load_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Write these values into the live LoRA matrices (optimizers keep their references). Raises ModelError."""
        _fill_adapter(self.model, state, "this state")

    def save_adapter(self, directory) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads them."""
        from safetensors.torch import save_file

        if not self.info["lora"]:
            raise ModelError("this policy has no adapter to save; load it with LoRA settings")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config["default"].to_dict()
        config["inference_mode"] = True
        # sets have no order: sorted, so that the same adapter gives the same bytes
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        save_file(self.adapter_state(), directory / "adapter_model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------- loading


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet():
    """No loading bars, multi-line reports or notes of the libraries: what is wrong is said in the ModelError."""
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    bitsandbytes = logging.getLogger("bitsandbytes")  # on CPU it recommends a kernel package that is not needed
    level = bitsandbytes.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that peft still uses
            yield
    finally:
        bitsandbytes.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _where(name: str, revision: str | None) -> dict:
    """The arguments that say where transformers looks: without a network it would retry for half a minute a file."""
    if Path(name).is_dir():
        return {"local_files_only": True}
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"no model {name!r}: there is no such directory, and it is no hub id (OWNER/NAME)")
    return {"revision": revision, "local_files_only": only_cached(name)}


def _load_config(name: str, where: dict):
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        hint = "; it holds an adapter: give it as the adapter" if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name} is a directory without config.json, so it is no model{hint}")
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError) as error:
        kind = "can be read from this directory" if path.is_dir() else "here or on the hub (check name and network)"
        raise ModelError(f"no model {name!r} {kind}: {_one_line(error)}") from error
    if (stored := getattr(config, "quantization_config", None)) is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
        raise ModelError(f"{name} is stored quantized ({method}); give the unquantized model, it is quantized on load")
    for setting in UNSUPPORTED_HEADS:
        if getattr(config, setting, None) not in (None, 1, 1.0):
            raise ModelError(f"{name}: unsupported config setting {setting}; use a Qwen2, Qwen3 or Llama model")
    other = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if other or not hasattr(config, "num_key_value_heads"):
        what = ", ".join(sorted(other)) or "no num_key_value_heads"
        raise ModelError(f"{name}: unsupported attention ({what}); use a Qwen2, Qwen3 or Llama model")
    return config


def _load_tokenizer(name: str, where: dict):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{name} has no usable tokenizer: {_one_line(error)}") from error
    text = "def f(x): return [x + 1]"
    # without its files transformers builds an empty tokenizer and says nothing
    if tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() != text:
        raise ModelError(f"{name} has no usable tokenizer: it cannot encode {text!r}; is tokenizer.json missing?")
    _check_tokenizer(tokenizer, name)
    return tokenizer


def _check_tokenizer(tokenizer, name: str) -> None:
    """Compare with the ids stored beside the model: AutoTokenizer picks a class by model type and may read the files
    differently from how they were meant, without a word."""
    check = Path(name) / "tokenizer_check.json"
    if not check.is_file():
        return
    try:
        wanted = json.loads(check.read_text(encoding="utf-8"))
        text, expected = wanted["text"], wanted["ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f'{check} is not {{"text": ..., "ids": [...]}}: {_one_line(error)}') from error
    if (ids := tokenizer(text, add_special_tokens=False)["input_ids"]) != expected:
        at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
        raise ModelError(
            f"{name}: {type(tokenizer).__name__} gives other ids than the model was trained with, from token {at} of "
            "tokenizer_check.json on; use the transformers version of requirements.txt, or rebuild the model"
        )


def _load_base(name: str, where: dict, quantization: str, dtype, device):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = dict(where)
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", device_map={"": device}, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{name} does not fit the memory of {device}: use nf4 or a smaller model") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{name} cannot be loaded as a causal language model: {_one_line(error)}") from error
    # transformers would go on with random values for both
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: its weight files lack {missing[0]} ({len(missing)} in all); the copy is incomplete")
    if wrong := sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]):
        raise ModelError(f"{name}: {wrong[0]} has another shape than config.json says ({len(wrong)} tensors in all)")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{name}: a language-model head with a bias, or none, is not supported")
    _settle(model)
    return model


def _settle(model) -> None:
    """Freeze the base and make training and evaluation compute the same."""
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in place at the first evaluation on such a CPU: evaluation and
            # training would then differ, and training fail
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _eos_ids(model, tokenizer) -> set[int]:
    found = [model.config.eos_token_id, tokenizer.eos_token_id]
    if getattr(model, "generation_config", None) is not None:
        found.append(model.generation_config.eos_token_id)  # the only field of it that is ever read
    lists = [entry if isinstance(entry, (list, tuple)) else [entry] for entry in found if entry is not None]
    return {i for entry in lists for i in entry}


def tokenizer_hash(tokenizer) -> str:
    """16 hex digits over the tokenizer as loaded, not over its files: two classes can read one file differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _revision(name: str, config) -> str | None:
    """The commit of a hub model; for a directory a fingerprint of its config and the start of its weight files."""
    if not Path(name).is_dir():
        return getattr(config, "_commit_hash", None)
    digest = hashlib.sha256((Path(name) / "config.json").read_bytes())
    for file in sorted(Path(name).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(16 << 20))
    return f"sha256:{digest.hexdigest()[:16]}"


def _quantization_info(model) -> dict:
    """Read from the loaded weights, not from what was asked for."""
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    states = [state for state in states if state is not None]
    if not states:
        return {"quantization": "none", "block_size": None, "double_quant": None}
    return {"quantization": states[0].quant_type, "block_size": states[0].blocksize, "double_quant": states[0].nested}


# ----------------------------------------------------------------------------------------------------------- adapters


def _adapter_tensors(model) -> dict[str, torch.nn.Parameter]:
    """The live LoRA matrices under the names that PEFT gives them in a file."""
    return {name.replace(".default", ""): p for name, p in sorted(model.named_parameters()) if ".lora_" in name}


def _add_lora(model, config):
    """LoRA modules of random values from `config`; the global random state is left as it was."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        try:
            model = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise ModelError(f"LoRA does not fit this model: {_one_line(error)}") from error
    for p in _adapter_tensors(model).values():
        p.data = p.data.float()
    return model


def _new_lora(model, settings: LoraSettings, name: str, seed: int):
    from peft import LoraConfig

    if settings.targets not in ("all-linear", "attention"):
        raise ModelError(f"LoRA targets must be all-linear or attention, not {settings.targets!r}")
    if settings.rank < 1 or not settings.alpha > 0:
        raise ModelError(f"LoRA needs rank >= 1 and alpha > 0, not {settings.rank} and {settings.alpha}")
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=ATTENTION if settings.targets == "attention" else "all-linear",
    )
    model = _add_lora(model, config)
    model.peft_config["default"].base_model_name_or_path = name
    generator = torch.Generator().manual_seed(seed)
    for key, p in _adapter_tensors(model).items():
        if ".lora_A." in key:  # Kaiming uniform with a = sqrt(5), as PEFT; drawn on the CPU, the same on every device
            bound = 1 / math.sqrt(p.shape[1])
            p.data.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
    return model, asdict(settings)


def _load_adapter(model, directory: Path):
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = directory / "adapter_model.safetensors"
    if not (directory / "adapter_config.json").is_file() or not weights.is_file():
        raise ModelError(f"{directory} is no adapter: it needs adapter_config.json and adapter_model.safetensors")
    try:
        config = PeftConfig.from_pretrained(str(directory))
        state = load_file(weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"the adapter in {directory} cannot be read: {_one_line(error)}") from error
    if str(getattr(config, "peft_type", "")).split(".")[-1] != "LORA" or config.use_dora or config.bias != "none" \
            or config.modules_to_save:
        raise ModelError(f"the adapter in {directory} is not plain LoRA: DoRA, biases, other modules are unsupported")
    config.inference_mode, config.lora_dropout = False, 0.0
    model = _add_lora(model, config)
    _fill_adapter(model, state, str(directory))
    attention = set(config.target_modules or ()) <= set(ATTENTION)
    return model, {"rank": config.r, "alpha": config.lora_alpha, "targets": "attention" if attention else "all-linear"}


def _fill_adapter(model, state: dict[str, torch.Tensor], origin: str) -> None:
    live = _adapter_tensors(model)
    if missing := sorted(live.keys() ^ state.keys()):
        where = "lacks" if missing[0] in live else "has, and the policy lacks,"
        raise ModelError(
            f"{origin} {where} {missing[0]} ({len(missing)} names differ): an adapter of another model or targets"
        )
    for name, p in live.items():
        if p.shape != state[name].shape:
            raise ModelError(
                f"{origin}: {name} has shape {tuple(state[name].shape)}, this model needs {tuple(p.shape)}: "
                "an adapter of another model or rank"
            )
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(state[name])
