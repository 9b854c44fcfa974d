"""NF4 in blocks with double quantization, as bitsandbytes does it, on a CPU and fast: what a 4-bit base really is.

    stored = quantize(weight.float(), block=64, double=True)
    reference = stored.dequantize(torch.bfloat16).view_as(weight)       # the weights that the forward pass used

Codes: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), the nearest of 16 normal quantiles to w / max|block|, blocks of
the flattened row-major weight. Scales: 8-bit codes of (max|block| - mean), in blocks of 256, which bitsandbytes itself
quantizes here (they are one number in 64). Bit-equal to bitsandbytes' CPU kernels, which take several times as long
for the codes: they search the 15 bounds for every weight, here each bound is one vectorised comparison on a piece that
stays in the cache. Left out: packing two codes into a byte, FP4, a GPU's kernels (a weight on a bound may differ).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

PIECE = 1 << 16  # weights: 256 KB in fp32; a multiple of every block size
SCALE_BLOCK = 256  # scales that share one fp32 number, bitsandbytes' constant


def pieces(n: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of a flat tensor that stay in the cache while a dozen operations run over them."""
    return ((start, min(n, start + PIECE)) for start in range(0, n, PIECE))


def code_values() -> np.ndarray:
    """The 16 values of a code, fp32, as bitsandbytes has them."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu").numpy()


@dataclass(frozen=True)
class NF4:
    """A quantized tensor, flattened: codes (n,) uint8, one a byte; scales (blocks,) fp32 as they are dequantized;
    scale_codes (blocks,) uint8 as they are stored (None without double quantization)."""

    codes: np.ndarray
    scales: torch.Tensor
    scale_codes: torch.Tensor | None
    block: int

    def piece(self, start: int, end: int, values: np.ndarray) -> torch.Tensor:
        """Weights start..end, fp32; start is a multiple of the block size."""
        weights = torch.from_numpy(np.take(values, self.codes[start:end]))
        return scaled_by(weights, self.scales, start, end, self.block)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """(n,) in `dtype`: value of the code times scale, in fp32, then rounded."""
        values, out = code_values(), torch.empty(len(self.codes), dtype=dtype)
        for start, end in pieces(len(self.codes)):
            out[start:end] = self.piece(start, end, values)
        return out


def scaled_by(x: torch.Tensor, scales: torch.Tensor, start: int, end: int, block: int) -> torch.Tensor:
    """x (end - start,) times the scale of its block."""
    return (x.view(-1, block) * scales[start // block : end // block, None]).view(-1)


def store_scales(maxima: torch.Tensor, double: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scales as they will be read back, their 8-bit codes); codes are None without double quantization."""
    if not double:
        return maxima, None
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    # Maxima are all positive, and the 8-bit code lies on both sides of 0: less their mean they use all of it.
    offset = maxima.mean()
    codes, state = quantize_blockwise(maxima - offset, blocksize=SCALE_BLOCK)
    return dequantize_blockwise(codes, state) + offset, codes


def codes_under(source, scales: torch.Tensor, n: int, block: int) -> np.ndarray:
    """(n,) uint8: the codes of what source(start, end) gives in fp32, under these scales (blocks,)."""
    values = code_values()
    bounds = (values[1:] + values[:-1]) / np.float32(2)
    # bitsandbytes multiplies by the reciprocal, and a division would put some weights into another code. The clamp is
    # for blocks of zeros: 0 * 1e38 is 0, where 0 times infinity would be NaN.
    inverse = 1.0 / scales.clamp(min=1e-38)
    codes = np.zeros(n, dtype=np.uint8)
    for start, end in pieces(n):
        scaled = scaled_by(source(start, end), inverse, start, end, block).numpy()
        above = np.empty(scaled.shape, dtype=bool)
        for bound in bounds:  # the code is how many of the 15 bounds lie below
            np.greater(scaled, bound, out=above)
            codes[start:end] += above.view(np.uint8)
    return codes


def quantize_pieces(source, n: int, block: int, double: bool) -> NF4:
    """`quantize` of what source(start, end) gives in fp32: a sum need not exist as a whole. Called twice a piece."""
    maxima = torch.cat([source(start, end).abs().view(-1, block).amax(1) for start, end in pieces(n)])
    return NF4(codes_under(source, maxima, n, block), *store_scales(maxima, double), block)


def quantize(weight: torch.Tensor, block: int = 64, double: bool = True) -> NF4:
    """NF4 of a tensor, flattened row by row. It must already have the dtype in which the loader held it (bf16, fp32):
    rounding comes first. ValueError: a block size that divides a piece or the tensor with a rest."""
    if PIECE % block or weight.numel() % block:
        raise ValueError(f"block size {block}: it must be a power of two up to 4096 that divides {weight.numel()}")
    flat = weight.reshape(-1)
    return quantize_pieces(lambda start, end: flat[start:end].float(), flat.numel(), block, double)
