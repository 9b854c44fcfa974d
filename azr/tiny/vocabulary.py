"""The embedded model's tokenizer: one token per byte, so per digit and letter of a value, and whole-word tokens.

Qwen2's own pre-tokenizer and an empty merge list, with every word and structural string as an added token. So
AutoTokenizer, which builds a Qwen2Tokenizer for this architecture whatever tokenizer.json says, gives the same ids; a
custom pre-tokenizer would load without a word and give others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from azr.tiny.documents import documents
from azr.tiny.operations import LETTERS

EOS = "<|endoftext|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STRUCTURE = [
    "User: ",
    "Assistant: <think>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "</think><answer>",
    "\n```\n",
    "```python\n",
    "```input\n",
    "```output\n",
    "```message\n",
    "\n```\n```input\n",
    "\n```\n```output\n",
    "def f(x):\n    ",
    "def f(x, y):\n    ",
    "def f(x, y, z):\n    ",
    "\n    return ",
    "\n    ",
    "\n        ",
    ":\n        ",
    "):\n        ",
    "\n    else:\n        ",
    "\n    if ",
    "\n    while ",
    "\n    for v in ",
    "\n    for v in range(",
    "if ",
    " if ",
    " else ",
    "while ",
    "for v in ",
    " for v in ",
    " if v>",
    ", ",
    "[::-1]",
    "[-1]",
    "[0]",
    "[]",
    "''",
    "%2==0",
    "//",
    ":]",
    "[:",
    "%len(",
    "+[",
    "]+",
    "=[",
    "]*",
    "''.join(sorted(",
    ".upper()",
    ".count(",
    ".find(",
    "sorted(",
    "len(",
    "sum(",
    "max(",
    "min(",
    "abs(",
    "list(",
    "str(",
    "+str(",
    ".values()",
    "{'a': ",
    "'b': ",
    ": ",
    "range(",
    "import random\n",
    "random.randint(",
    "return ",
    "try ",
    "again ",
    " gives ",
    " yes;",
    " no;",
    "yes;",
    "no;",
    " then ",
    "uses ",
    " to ",
    " and ",
    " of ",
    " in ",
    " each",
    "each ",
    " added",
    "propose ",
    "solve ",
    "Write the digits ",
    " in rising order.",
    " in falling order.",
]


def words_of_the_documents(count: int = 3000) -> list[str]:
    """Words of three letters or more; none that could be part of a value (all letters in a-h)."""
    text = "\n".join(prompt + response for prompt, response in documents(seed=1, count=count))
    words = set(re.findall(r"[A-Za-z]{3,}", text)) - {"User", "Assistant"}
    return sorted(w for w in words if not set(w.lower()) <= set(LETTERS))


def build(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    added = list(dict.fromkeys(STRUCTURE + words_of_the_documents()))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
