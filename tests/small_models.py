"""A Qwen2 of two layers with random weights, a tokenizer for it, and prompts: what tests of the policy sample from."""

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from azr.policy.policy import Policy

REAL_TOKENIZER = Path(__file__).parents[1].parent / "shared" / "data" / "qwen2.5-tokenizer"


def made_up_tokenizer():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    # the pre-tokenizer of Qwen2, which transformers uses for this model type whatever the file says
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x): return x + 1", "answer = f(12)", "<answer>think</answer>"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_model(directory: Path, tokenizer, vocab: int, tie: bool = True) -> str:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    # a checkpoint's own sampling settings must never be used
    model.generation_config.update(temperature=0.1, top_k=3, top_p=0.5, repetition_penalty=1.3, do_sample=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def stirred(policy: Policy, scale: float = 0.05) -> Policy:
    """Give the LoRA matrices values that change the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy


def prompts_of(count: int, low: int = 1, high: int = 40, vocab: int = 300, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(rng.randint(low, high))] for _ in range(count)]


def seeds_of(count: int, n: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.getrandbits(64) for _ in range(n)] for _ in range(count)]
