"""The fused kernels of a decode step against torch's operations, in Triton's interpreter; what a GPU runs is the same
source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from azr.policy import decode_ops

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = """
import torch
from azr.policy import decode_ops, decode_triton
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    print(decode_ops.largest_difference(decode_ops, decode_triton, torch.device("cpu"), dtype))
# views of one product, as the decoder has them, and sizes that are no powers of two
product = torch.randn(5, 7 * 24 + 2 * 100)
q, k, v = (product[:, a:b].view(5, -1, 24) for a, b in ((0, 72), (72, 120), (120, 168)))
cos, sin = torch.randn(2, 5, 1, 24)
page, offset = torch.tensor([4, 1, 0, 2, 2]), torch.tensor([0, 2, 1, 1, 0])
ours, theirs = torch.zeros(2, 2, 5, 3, 2, 24)
expected = decode_ops.rotate_store(q.clone(), k.clone(), v, cos, sin, theirs, page, offset)
got = decode_triton.rotate_store(q, k, v, cos, sin, ours, page, offset)
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip((*got, ours), (*expected, theirs)))
gate, up = product[:, 168:268], product[:, 268:]
assert torch.allclose(decode_triton.silu_mul(gate, up), decode_ops.silu_mul(gate, up), atol=1e-6)
print("views ok")
"""


def test_kernels_equal_torchs_operations():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    fp32, bf16, views = done.stdout.split("\n")[:3]
    assert float(fp32) <= 2e-6 and float(bf16) <= decode_ops.TOLERANCE[torch.bfloat16] and views == "views ok"


def test_norm_rounds_where_transformers_rounds():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = Qwen2RMSNorm(64, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x, delta = torch.randn(2, 7, 64).bfloat16()
    total = x + delta
    assert torch.equal(decode_ops.add_rms_norm(x, delta, norm.weight, 1e-6), norm(total)) and torch.equal(x, total)


def test_rotation_rounds_where_transformers_rounds():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    q, k, angle = torch.randn(5, 4, 16).bfloat16(), torch.randn(5, 2, 16).bfloat16(), torch.randn(5, 8)
    cos, sin = torch.cat([angle.cos()] * 2, -1).bfloat16(), torch.cat([angle.sin()] * 2, -1).bfloat16()
    expected = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    turned = torch.cat((-sin[:, :8], sin[:, 8:]), -1)[:, None]
    cache = torch.zeros(2, 2, 3, 2, 16, dtype=torch.bfloat16)
    where = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2])
    got = decode_ops.rotate_store(q.clone(), k.clone(), k, cos[:, None], turned, cache, *where)
    assert all(torch.equal(a, b.transpose(1, 2)[0]) for a, b in zip(got, expected))
    assert torch.equal(cache[0][where], got[1]) and torch.equal(cache[1][where], k)


def test_a_cpu_takes_torchs_operations_and_a_broken_triton_is_told_of(monkeypatch, capsys):
    assert decode_ops.operations(torch.device("cpu"), torch.float32) is decode_ops
    monkeypatch.setitem(sys.modules, "azr.policy.decode_triton", None)
    assert decode_ops.operations(torch.device("cuda"), torch.bfloat16) is decode_ops
    assert "fused kernels of a decode step cannot be used" in capsys.readouterr().err
