"""Loading: a frozen base in 4 bits (or not), its tokenizer, and fp32 LoRA on it, new or saved.

Every way in which a checkpoint can be incomplete, or mean something else than it says, is refused in one line; so is
a machine that cannot compute it. Weights that are stored in bitsandbytes' NF4 are taken as they are.
Left out: several GPUs, trained heads or embeddings, encoder-decoder, other stored quantizations.
"""

import copy
import hashlib
import importlib.util
import json
import logging
import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..console import warn
from ..isolated import one_line
from ..models import ALIASES, only_cached
from .backoff import allocate_in_segments_that_grow, is_out_of_memory
from .gpu import look, why_no_four_bit, why_unusable
from .lora import fuse
from .opening import ModelError, check_adapter, fingerprint, not_finite

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16_SINCE = (8, 0)  # compute capability of the first cards with it in hardware, Ampere
# settings of a config that change the logits after the head, which the chunked scoring does not know
UNSUPPORTED_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
LARGE = 100e6  # bytes of weights; computing less on a CPU needs no warning


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA of a new adapter: B A of this rank on every linear matrix of a layer, or on those of attention."""

    rank: int = 32
    alpha: float = 64  # the update is (alpha / rank) B A
    targets: str = "all-linear"  # "all-linear" | "attention"


def load_model(
    name: str,
    quantization: str,
    lora: LoraSettings | None,
    adapter,
    dtype,
    device,
    seed: int,
    revision: str | None,
    need_gpu: bool = False,
):
    """(model, tokenizer, info, eos_ids) of a hub id or a directory; see `Policy.load`. Raises ModelError."""
    if lora is not None and adapter is not None:
        raise ModelError("give new LoRA settings or a saved adapter, not both: an adapter brings its own settings")
    if quantization not in ("nf4", "none"):
        raise ModelError(f"quantization must be nf4 or none, not {quantization!r}")
    _check_name(name)
    allocate_in_segments_that_grow()
    device = _choose_device(name, device, quantization, need_gpu)
    dtype = compute_dtype(dtype, device)
    hide_broken_flash_attention()
    with quiet():
        # Without a network transformers would retry for half a minute a file.
        local = Path(name).is_dir()
        where = {"local_files_only": True} if local else {"revision": revision, "local_files_only": only_cached(name)}
        config = _load_config(name, where)
        stored = _stored_in_four_bits(name, config, quantization)
        tokenizer = load_tokenizer(name, where)
        model = _load_base(name, where, quantization, stored, dtype, device)
        eos_ids = _eos_ids(model, tokenizer)
        info = {
            "base_model": name,
            # The commit of a hub model; of a directory, its config and the start of its weight files.
            "revision": fingerprint(Path(name)) if Path(name).is_dir() else getattr(config, "_commit_hash", None),
            **_quantization_info(model),
            "dtype": str(dtype).removeprefix("torch."),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "lora": None,
        }
        if adapter is not None:
            model, info["lora"] = _load_adapter(model, Path(adapter), name)
        elif lora is not None:
            model, info["lora"] = _new_lora(model, lora, name, seed)
    return model, tokenizer, info, eos_ids


def auto_dtype(device) -> str:
    """bf16 on a GPU that has it in hardware, fp16 on an older one, fp32 on a CPU."""
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.version.hip or torch.cuda.get_device_capability(device) >= BF16_SINCE else "fp16"


def compute_dtype(asked, device) -> torch.dtype:
    """The torch.dtype of a name, of "auto" (None too) or of itself; a warning where the device is slow in it."""
    name = auto_dtype(device) if asked in (None, "auto") else asked
    dtype = DTYPES.get(name, name)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)} or a torch.dtype, not {asked!r}")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and dtype is torch.bfloat16 and auto_dtype(device) == "fp16":
        warn("this GPU has no bf16 in hardware: torch emulates it, which is much slower than --dtype fp16")
    elif not on_gpu and dtype in (torch.bfloat16, torch.float16):
        warn(f"{str(dtype)[6:]} on a CPU is for tests: most CPUs compute in it many times slower than in fp32")
    return dtype


def _choose_device(name: str, device, quantization: str, need_gpu: bool) -> torch.device:
    """The device asked for, else the GPU, else, with a warning if the model is large, the CPU.

    ModelError: no GPU, and `need_gpu`; a GPU that this torch or, for 4 bits, this bitsandbytes cannot compute on.
    """
    if device is None:
        facts = look()
        if why := why_unusable(facts):
            if need_gpu:
                raise ModelError(
                    f"{name} needs a GPU: {why}; --model tiny is made for a CPU, and --allow-cpu takes this one there "
                    "all the same: days, for billions of weights"
                )
            if facts.error is None:
                raise ModelError(f"{why}; CUDA_VISIBLE_DEVICES= computes on the CPU")
            if _is_large(name):
                warn(f"{name} is computed on the CPU, slowly: {why}")
            return torch.device("cpu")
    device = torch.device(device or "cuda")
    if device.type == "cuda":
        if quantization == "nf4" and (why := why_no_four_bit()):
            raise ModelError(why)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _is_large(name: str) -> bool:
    path = Path(name)
    files = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return not path.is_dir() or sum(file.stat().st_size for file in files) > LARGE


def hide_broken_flash_attention() -> None:
    """Let a flash-attn that cannot be imported count as not installed, with a line on stderr: transformers and peft
    look at an installed one and would fail with it, and nothing here needs it."""
    if importlib.util.find_spec("flash_attn") is None:
        return
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # a wheel for another torch raises ImportError, OSError, RuntimeError, ...
        sys.modules["flash_attn"] = None  # so that find_spec and import say: not there
        warn(f"flash-attn is installed but broken ({one_line(error)}): going on without it")


@contextmanager
def quiet():
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


def _check_name(name: str) -> None:
    """ModelError unless it is the directory of a model or might be on the hub."""
    path = Path(name)
    if (path / "checkpoints").is_dir():
        raise ModelError(f"{name} is a run, not a model: give the model it trained, and the run with --adapter")
    if path.is_dir() and not (path / "config.json").is_file():
        hint = "; it holds an adapter: give it with --adapter" if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name} is a directory without config.json, so it is no model{hint}")
    if not path.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") != 1):
        known = f"{', '.join(ALIASES)}, a hub id (OWNER/NAME) or a directory that is there"
        raise ModelError(f"no model {name!r}: give {known}")


def _load_config(name: str, where: dict):
    from transformers import AutoConfig

    path = Path(name)
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError) as error:
        hub = "" if path.is_dir() else " (check name and network; a downloaded model is given as its directory)"
        raise ModelError(f"no model can be read from {name!r}{hub}: {one_line(error)}") from error
    for setting in UNSUPPORTED_HEADS:
        if getattr(config.get_text_config(), setting, None) not in (None, 1, 1.0):
            raise ModelError(f"{name}: unsupported config setting {setting}; use a Qwen2, Qwen3 or Llama model")
    return config


def _stored_in_four_bits(name: str, config, quantization: str) -> bool:
    """Whether the weights are stored as bitsandbytes' NF4. ModelError: quantized otherwise, or asked for without."""
    stored = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not stored:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method")))
    if method == "bitsandbytes":
        method += f", {stored.get('bnb_4bit_quant_type', 'fp4')}" if stored.get("load_in_4bit") else ", 8 bits"
    if method != "bitsandbytes, nf4":
        raise ModelError(
            f"{name} is stored quantized ({method}), and only bitsandbytes' nf4 is taken as it is stored; give the "
            "unquantized model, it is quantized on load"
        )
    if quantization != "nf4":
        raise ModelError(
            f"{name} is stored in 4 bits, which cannot be undone: take --quantization nf4, or give the unquantized "
            "model"
        )
    return True


def load_tokenizer(name: str, where: dict):
    """The tokenizer of a hub id or a directory; `where` as transformers takes it. ModelError: it cannot encode code, or
    gives other ids than the model was trained with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{name} has no usable tokenizer: {one_line(error)}") from error
    text = "def f(x): return [x + 1]"
    # without its files transformers builds an empty tokenizer and says nothing
    if tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() != text:
        raise ModelError(f"{name} has no usable tokenizer: it cannot encode {text!r}; is tokenizer.json missing?")
    # The embedded model has ids beside it to compare with: AutoTokenizer picks a class by model type and may read the
    # files differently from how they were meant, without a word.
    if (check := Path(name) / "tokenizer_check.json").is_file():
        expected = json.loads(check.read_text(encoding="utf-8"))
        if tokenizer(expected["text"], add_special_tokens=False)["input_ids"] != expected["ids"]:
            raise ModelError(
                f"{name}: {type(tokenizer).__name__} gives other ids than those of tokenizer_check.json, which the "
                "model was trained with; use the transformers version of requirements.txt, or rebuild the model"
            )
    return tokenizer


def _load_base(name: str, where: dict, quantization: str, stored: bool, dtype, device):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = dict(where)
    if quantization == "nf4" and not stored:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )

    failed_before = _failed_allocations(device)
    try:
        # Attention is left to transformers: SDPA wherever the architecture has it.
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        # transformers turns memory that ran out while it quantized into "some issues during automatic conversion"
        if is_out_of_memory(error) or _failed_allocations(device) > failed_before:
            raise torch.OutOfMemoryError("while the weights were loaded") from error
        raise ModelError(f"{name} cannot be loaded as a causal language model: {one_line(error)}") from error
    # transformers would go on with random values for both
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: its weight files lack {missing[0]} ({len(missing)} in all); the copy is incomplete")
    if wrong := sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]):
        raise ModelError(f"{name}: {wrong[0]} has another shape than config.json says ({len(wrong)} tensors in all)")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{name}: a language-model head with a bias, or none, is not supported")
    if stored:
        _take_dtype(name, model, dtype)
    _settle(model)
    if quantization == "nf4":
        _say_what_is_not_in_four_bits(name, model, dtype)
    return model


def _say_what_is_not_in_four_bits(name: str, model, dtype) -> None:
    """Warn if many weights are not in 4 bits: bitsandbytes packs linear layers only, and the experts of a mixture are
    none, so that such a model takes about four times the memory that one would plan for."""
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    packed, rest, largest = 0, 0, ("", 0)
    for key, p in model.named_parameters():
        if type(p).__name__ == "Params4bit":
            packed += p.quant_state.shape.numel()
        elif id(p) not in tables:
            rest, largest = rest + p.numel(), max(largest, (key, p.numel()), key=lambda pair: pair[1])
    if rest > packed / 4:
        warn(
            f"{name}: {rest / 1e9:.2f} of {(packed + rest) / 1e9:.2f} billion weights are not in 4 bits but in "
            f"{str(dtype)[6:]}, such as {largest[0]}"
        )


def _failed_allocations(device) -> int:
    """How often a GPU's memory has run out in this process, whatever became of the error; 0 on a CPU."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def _take_dtype(name: str, model, dtype) -> None:
    """Let a model that was stored in 4 bits compute in `dtype`, as one that is quantized on load does, and not in the
    dtype of its file. ModelError: a scale of its 4-bit weights is missing."""
    exempt = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    exempt |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for key, p in model.named_parameters():
        if type(p).__name__ != "Params4bit" and p.is_floating_point() and not exempt & set(key.split(".")):
            p.data = p.data.to(dtype)  # transformers 5.23 leaves them in the file's
    for key, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            if (state := getattr(module.weight, "quant_state", None)) is None:
                raise ModelError(f"{name}: its weight files lack how {key} is quantized; the copy is incomplete")
            state.dtype = module.compute_dtype = dtype
            module.compute_type_is_set = True


def _settle(model) -> None:
    """Freeze the base and make training and evaluation compute the same."""
    model.requires_grad_(False)
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            # A weight that knows its module is a reference cycle: the GPU's memory would outlive the model until
            # Python happens to collect garbage.
            module.weight.module = None
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in place at the first evaluation on such a CPU: evaluation and
            # training would then differ, and training fail
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _eos_ids(model, tokenizer) -> set[int]:
    """The tokens that end a response, by the config, the tokenizer or generation_config (of which nothing else is ever
    read); each names none, one or a list."""
    sources = (model.config.get_text_config(), tokenizer, getattr(model, "generation_config", None))
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return {i for ids in named if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])}


def tokenizer_hash(tokenizer) -> str:
    """16 hex digits over the tokenizer as loaded, not over its files: two classes can read one file differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quantization_info(model) -> dict:
    """How the base is held, for azr.json: read from the loaded weights, whatever was asked for."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    if (state := next((state for state in states if state is not None), None)) is None:
        return {"quantization": "none", "block_size": None, "double_quant": None}
    return {"quantization": state.quant_type, "block_size": state.blocksize, "double_quant": state.nested}


# ----------------------------------------------------------------------------------------------------------- adapters


def adapter_tensors(model, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """The live LoRA matrices of an adapter under the names that PEFT gives them in a file."""
    own = (pair for pair in sorted(model.named_parameters()) if ".lora_" in pair[0] and f".{adapter}." in pair[0])
    return {name.replace(f".{adapter}", ""): p for name, p in own}


def _add_lora(model, config):
    """The model with LoRA matrices as `config` says, fp32 and of random values; random numbers that others draw stay
    what they were."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        try:
            model = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise ModelError(f"LoRA does not fit this model: {one_line(error)}") from error
    for p in adapter_tensors(model).values():
        p.data = p.data.float()
    fuse(model)
    return model


def add_copy(model, adapter: str) -> None:
    """A further adapter of this name on a model that has one: its settings and weights are those of the first now; the
    first stays in use."""
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that are overwritten below
        model.add_adapter(adapter, copy.deepcopy(model.peft_config["default"]))
    for p in adapter_tensors(model, adapter).values():
        p.data = p.data.float()
    fill_adapter(model, adapter_tensors(model), f"the adapter {adapter}", adapter)


def _new_lora(model, settings: LoraSettings, name: str, seed: int):
    from peft import LoraConfig

    if settings.targets not in ("all-linear", "attention"):
        raise ModelError(f"LoRA targets must be all-linear or attention, not {settings.targets!r}")
    if settings.rank < 1 or not settings.alpha > 0:
        raise ModelError(f"LoRA needs rank >= 1 and alpha > 0, not {settings.rank} and {settings.alpha}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=ATTENTION if settings.targets == "attention" else "all-linear",
    )
    if model.config.get_text_config() is not model.config:  # it also sees or hears, which no update would change
        config.exclude_modules = r".*(vision|visual|audio|multi_modal).*"
    model = _add_lora(model, config)
    model.peft_config["default"].base_model_name_or_path = name
    generator = torch.Generator().manual_seed(seed)
    for key, p in adapter_tensors(model).items():
        if ".lora_A." in key:  # Kaiming uniform with a = sqrt(5), as PEFT; drawn on the CPU, the same on every device
            bound = 1 / math.sqrt(p.shape[1])
            p.data.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
    return model, asdict(settings)


def _load_adapter(model, directory: Path, base_name: str):
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
        raise ModelError(f"the adapter in {directory} cannot be read: {one_line(error)}") from error
    linear = {
        f"{key}.weight": (m.out_features, m.in_features)
        for key, m in model.named_modules()
        if hasattr(m, "in_features")
    }
    check_adapter(directory, {key: tuple(tensor.shape) for key, tensor in state.items()}, linear, base_name)
    if config.use_dora:
        raise ModelError(f"the adapter in {directory} is DoRA, which can be measured but not sampled from")
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise not_finite(weights, broken[0])
    config.inference_mode, config.lora_dropout = False, 0.0
    model = _add_lora(model, config)
    fill_adapter(model, state, str(directory))
    attention = set(config.target_modules or ()) <= set(ATTENTION)
    return model, {"rank": config.r, "alpha": config.lora_alpha, "targets": "attention" if attention else "all-linear"}


def fill_adapter(model, state: dict[str, torch.Tensor], origin: str, adapter: str = "default") -> None:
    """Copies values into the live LoRA matrices. ModelError, which names `origin`: other names or shapes."""
    otherwise = "an adapter of another model, rank or targets"
    fill(adapter_tensors(model, adapter), state, origin, otherwise)


def fill(live: dict[str, torch.Tensor], state: dict[str, torch.Tensor], origin: str, otherwise: str) -> None:
    """Copies values into live tensors of the same names. ModelError: other names or shapes, which is `otherwise`."""
    ours, theirs = ({(name, tuple(t.shape)) for name, t in tensors.items()} for tensors in (live, state))
    if differences := sorted(ours ^ theirs):
        name, shape = differences[0]
        verb = "lacks" if differences[0] in ours else "has, and this model lacks,"
        raise ModelError(f"{origin} {verb} {name} of shape {shape}: {otherwise}")
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(state[name])
