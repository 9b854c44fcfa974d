"""What an update did to the weights: every definition against a direct computation, an exact case or a known table."""

import math

import numpy as np
import pytest
import torch

from azr.weights import nf4, sizes, spectra

SIGMA, SIDE = 0.02, 1024


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m, n, rank, rms, seed=1, decay=1.0):
    """An update U diag(decay^i) V^T of that RMS with random orthonormal factors, and its singular values."""
    generator = torch.Generator().manual_seed(seed)
    s = decay ** torch.arange(rank, dtype=torch.float32)
    s *= rms * math.sqrt(m * n) / s.norm()
    u, v = sizes.orthonormal(m, rank, generator), sizes.orthonormal(n, rank, generator)
    return (u * s) @ v.T, s


@pytest.fixture(scope="module")
def base():
    """(bf16 checkpoint, its NF4 codes, the dequantised base)."""
    weight = (SIGMA * gaussian(SIDE, SIDE)).bfloat16()
    stored = nf4.quantize(weight)
    return weight, stored, stored.dequantize(torch.bfloat16).view_as(weight)


# ---------------------------------------------------------------- NF4


@pytest.mark.parametrize("shape", [(256, 192), (80, 128), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_bit_equal_to_bitsandbytes(shape, dtype, double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = (SIGMA * gaussian(*shape)).to(dtype)
    weight[0, :3] = 0
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    packed = packed.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.numel()]
    stored = nf4.quantize(weight, 64, double)
    assert np.array_equal(stored.codes, codes.numpy())
    assert torch.equal(stored.scale_codes if double else stored.scales, state.absmax)
    read = dequantize_4bit(packed.view(-1, 1), state).to(dtype)
    assert torch.equal(stored.dequantize(dtype).view(shape), read)


def test_the_reference_is_what_the_loaded_model_computes_with():
    import bitsandbytes as bnb

    from azr.weights.reference import Reference

    weight = (SIGMA * gaussian(64, 128)).bfloat16()
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight.float(), requires_grad=False, quant_type="nf4")
    used = layer.to("cpu")(torch.eye(128)).T
    w0, original, stored = Reference("nf4", torch.float32).weights(weight)
    assert torch.equal(w0, used) and torch.equal(original, weight)
    with pytest.raises(ValueError, match="rows of 96"):  # there the kernels disagree with each other
        Reference("nf4", torch.float32).weights(weight[:, :96])


def test_nf4_of_a_block_of_zeros_and_of_weights_on_the_bounds():
    from bitsandbytes.functional import quantize_4bit

    values = nf4.code_values()
    bounds = torch.from_numpy((values[1:] + values[:-1]) / 2)
    weight = torch.zeros(4, 64)
    weight[1, :15], weight[1, 15] = bounds, 1.0
    weight[2, :15], weight[2, 15] = torch.nextafter(bounds, torch.ones(15)), 1.0
    packed, _ = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = packed.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    assert np.array_equal(nf4.quantize(weight).codes, codes.numpy())


# ---------------------------------------------------------------- the table of sizes


TABLE = {  # RMS: |d| <= 1e-5, bf16 bits, the same within 1e-5; a random rank-32 update, a Gaussian base, sigma 0.02
    1e-6: (1.000, 0.988, 1.000),
    1e-5: (0.690, 0.885, 0.925),
    3e-5: (0.270, 0.684, 0.700),
    1e-4: (0.080, 0.330, 0.335),
    3e-4: (0.030, 0.121, 0.123),
    1e-3: (0.010, 0.037, 0.037),
}


@pytest.mark.parametrize("rms", TABLE)
def test_one_update_reads_anything_between_0_and_100_percent(base, rms):
    weight, _, _ = base
    delta, _ = low_rank(SIDE, SIDE, 32, rms)
    size, shares = sizes.sizes(weight, delta), sizes.compare(weight, delta, weight)
    within, s1, s2 = TABLE[rms]
    assert size.report()["U1_rms"] == pytest.approx(rms, rel=1e-3)
    assert size.report()["U1_rel_fro"] == pytest.approx(rms / SIGMA, rel=0.01)
    assert size.zeros == 0
    assert size.within[sizes.TOLERANCES.index(1e-5)] / size.n == pytest.approx(within, abs=0.02)
    assert shares.s1 == pytest.approx(s1, abs=0.02)
    assert shares.near / shares.n == pytest.approx(s2, abs=0.02)


@pytest.mark.parametrize(
    "rms, s1, codes", [(1e-6, 0.91, 1.0), (1e-5, 0.87, 1.0), (1e-4, 0.33, 1.0), (1e-3, 0.04, 0.978)]
)
def test_on_a_4_bit_base_zeros_cap_the_sparsity_and_codes_do_not_move(base, rms, s1, codes):
    weight, stored, w0 = base
    delta, _ = low_rank(SIDE, SIDE, 32, rms)
    report = sizes.compare(w0, delta, weight, stored=stored).report()
    assert report["S1"] == pytest.approx(s1, abs=0.02)
    assert report["zero_base_share"] == pytest.approx(0.09, abs=0.01)
    assert report["S1_zero_base"] == pytest.approx(0, abs=0.001)
    assert report["S3_code_requantized"] == pytest.approx(codes, abs=0.01)
    assert report["S3_code_frozen_scale"] >= report["S3_code_requantized"]
    assert report["S3_survival"] < 0.3  # a 4-bit merge loses the update
    # the paper's definition does not depend on how the base was held
    plain = sizes.compare(weight, delta, weight)
    assert report["S2"] == pytest.approx(plain.near / plain.n, abs=0.001)


def test_a_large_update_survives_requantization(base):
    weight, stored, w0 = base
    delta, _ = low_rank(SIDE, SIDE, 32, 2e-2)
    report = sizes.compare(w0, delta, weight, stored=stored).report()
    assert report["S3_survival"] > 0.9 and report["S3_code_requantized"] < 0.4


@pytest.mark.parametrize("rms", [1e-6, 1e-5, 1e-4, 1e-3])
def test_the_original_checkpoint_is_the_wrong_reference(base, rms):
    """Whatever an adapter learned, w0 + delta differs from the original nearly everywhere: by the quantization."""
    weight, _, w0 = base
    delta, _ = low_rank(SIDE, SIDE, 32, rms)
    trap = sizes.compare(weight, (w0.float() + delta) - weight.float(), weight)
    assert trap.s1 <= 0.03 and trap.near / trap.n <= 0.04
    assert sizes.compare(w0, delta, weight).s1 > trap.s1 or rms == 1e-3


def test_exact_share_of_changed_entries():
    weight = (SIGMA * gaussian(100, 100)).bfloat16()
    tuned = weight.clone().view(-1).view(torch.int16)
    tuned[torch.randperm(10_000, generator=torch.Generator().manual_seed(3))[:3700]] ^= (
        1  # the last bit: the least change
    )
    delta = tuned.view(torch.bfloat16).view(100, 100).float() - weight.float()
    assert sizes.compare(weight, delta, weight).s1 == 0.63
    assert sizes.sizes(weight, delta).report()["S0"] == 0.63


def test_counts_of_parts_add_up_to_those_of_the_whole(base):
    weight, _, _ = base
    delta, _ = low_rank(SIDE, SIDE, 8, 1e-4)
    whole = sizes.sizes(weight, delta), sizes.compare(weight, delta, weight)
    rows = slice(0, 700), slice(700, SIDE)
    for i, count in enumerate((sizes.sizes, lambda a, d: sizes.compare(a, d, a))):
        total = count(weight[rows[0]], delta[rows[0]]) + count(weight[rows[1]], delta[rows[1]])
        for ours, theirs in zip(vars(total).values(), vars(whole[i]).values()):
            assert np.allclose(ours, theirs, rtol=1e-5)


def test_untouched_counts_as_unchanged(base):
    weight, _, _ = base
    size, shares = sizes.untouched(weight, quantized=True)
    direct = sizes.sizes(weight, torch.zeros_like(weight, dtype=torch.float32))
    assert size.report() == direct.report() | {"U1_rel_fro": 0.0} and size.report()["S6"] is None
    assert shares.s1 == 1.0 and shares.report()["S3_code_requantized"] == 1.0
    assert shares.report()["S3_survival"] is None


def test_relative_tolerances():
    w0, delta = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[1e-3, 1e-3, 1e-3, 0.0]])
    size = sizes.sizes(w0, delta)
    at = sizes.TOLERANCES.index(1e-3)
    assert size.within_relative[at] == 3 and size.within_relative[at - 1] == 1  # 0 / 0 is unchanged, 1e-3 / 0 never


# ---------------------------------------------------------------- S6


def test_concentration_from_bins_equals_that_of_the_sorted_entries():
    delta = gaussian(300, 300) * gaussian(300, 1).exp()
    delta[:30] = 0
    found = sizes.concentration(*sizes.binned_energy(sizes.sizes(delta, delta).histogram))
    energy = np.sort(delta.double().square().view(-1).numpy())
    exact = sizes.concentration(np.ones(energy.size), energy)
    n = energy.size
    gini = (2 * np.arange(1, n + 1) - n - 1) @ energy / (n * energy.sum())
    assert exact["gini"] == pytest.approx(gini, abs=1e-9)
    assert exact["top_1%_energy"] == pytest.approx(energy[-n // 100 :].sum() / energy.sum(), abs=1e-4)
    assert found["gini"] == pytest.approx(gini, abs=2e-3)
    assert found["top_1%_energy"] == pytest.approx(exact["top_1%_energy"], abs=2e-3)


def test_gini_of_gaussian_squares_and_of_stripes():
    found = sizes.concentration(*sizes.binned_energy(sizes.sizes(gaussian(500, 500), gaussian(500, 500)).histogram))
    assert found["gini"] == pytest.approx(2 / math.pi, abs=0.005)
    delta = torch.zeros(100, 50)
    delta[:10] = 1.0
    rows, columns = sizes.axis_energies(delta)
    assert sizes.profile(rows)["gini"] == pytest.approx(0.9) and sizes.profile(columns)["gini"] == pytest.approx(0)
    assert np.allclose(rows, 50 * (np.arange(100) < 10)) and np.allclose(columns, 10)


# ---------------------------------------------------------------- S5


def excess_of(w0, delta, singular, seed=7):
    shares = sizes.compare(w0, delta, w0)
    draws = sizes.null_draws(w0, singular, 1.0, torch.Generator().manual_seed(seed))
    return sizes.excess(shares.s1, draws.spectrum), sizes.excess(shares.s1, draws.flat), draws


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.0], ids=["flat", "decaying", "rank one"])
def test_structureless_updates_have_no_excess(decay):
    """A 95 % interval misses 0 in one of twenty; of 30 updates at most 5 do (p = 0.003 if it holds)."""
    outside = 0
    for seed in range(30):
        w0 = (SIGMA * gaussian(192, 128, seed=seed)).bfloat16()
        delta, s = low_rank(192, 128, 8, 1e-4, seed=100 + seed, decay=max(decay, 1e-6))
        found, _, _ = excess_of(w0, delta, s, seed=200 + seed)
        outside += not found["low"] <= 0 <= found["high"]
    assert outside <= 5


def stored(w0, delta):
    """What bf16 keeps of an update: the difference of the two stored tensors."""
    return (w0.float() + delta).bfloat16().float() - w0.float()


def excess_as_stored(w0, delta):
    change = stored(w0, delta)
    generator = torch.Generator().manual_seed(11)
    draws = sizes.null_draws(w0, torch.linalg.svdvals(change), 1.0, generator, rounded=change)
    assert draws.matched is None  # scaled, what is gone does not come back
    return sizes.excess(sizes.compare(w0, change, w0).s1, draws.spectrum)


@pytest.mark.parametrize("rms, rank", [(3e-6, 96), (3e-5, 96), (3e-5, 16), (5e-4, 16)])
def test_rounding_is_no_structure(rms, rank):
    """What bf16 stores of a random update, most of which is too small for it, has no excess; see the test above (of 12
    at most 3: p = .002). The plain null, which is not rounded, says of the same that chance changes less."""
    outside = 0
    for seed in range(12):
        w0 = (SIGMA * gaussian(128, 96, seed=seed)).bfloat16()
        delta, _ = low_rank(128, 96, rank, rms, seed=300 + seed)
        found = excess_as_stored(w0, delta)
        outside += not found["low"] <= 0 <= found["high"]
    assert outside <= 3
    plain = excess_of(w0, stored(w0, delta), torch.linalg.svdvals(stored(w0, delta)))[0]
    assert rms > 1e-4 or plain["high"] < 0


def test_a_sparse_update_is_found_behind_the_rounding():
    w0 = (SIGMA * gaussian(256, 192)).bfloat16()
    delta, _ = low_rank(256, 192, 192, 1e-4)
    planted = delta * (gaussian(1, 192, seed=5) > 1)  # a sixth of the columns
    assert excess_as_stored(w0, planted)["low"] > 0.05
    # what rounding hides is a very low rank, whose entries have heavier tails: it reads as a little sparsity
    delta, _ = low_rank(256, 192, 4, 3e-5)
    assert 0 < excess_as_stored(w0, delta)["excess"] < 0.03


def test_rank_looks_like_structure_to_a_flat_null():
    w0 = (SIGMA * gaussian(512, 512)).bfloat16()
    delta, s = low_rank(512, 512, 16, 1e-4, decay=1e-6)  # rank one in truth
    matched, flat, _ = excess_of(w0, delta, s)
    assert matched["low"] <= 0 <= matched["high"]
    assert flat["low"] > 0.1


def test_a_planted_sparse_update_is_found():
    """Confined to a tenth of the rows: at the same spectrum a random update changes weights everywhere."""
    w0 = (SIGMA * gaussian(512, 384)).bfloat16()
    delta, s = low_rank(512, 384, 16, 1e-4, decay=0.8)
    planted = torch.zeros_like(delta)
    planted[:51] = low_rank(51, 384, 16, 1.0, decay=0.8)[0]
    planted *= delta.norm() / planted.norm()
    found, _, draws = excess_of(w0, planted, torch.linalg.svdvals(planted)[:16])
    assert found["low"] > 0.3
    rows, columns = (sizes.profile(energy)["gini"] for energy in sizes.axis_energies(planted))
    assert sizes.excess(rows, draws.row_gini)["low"] > 0.3
    assert sizes.excess(columns, draws.column_gini)["low"] <= 0


@pytest.mark.parametrize("shape", [(160, 96), (96, 160), (128, 128)])
def test_full_rank_null_is_the_null_of_that_spectrum(shape):
    m, n = shape
    s = torch.linspace(1, 0.01, min(shape)) ** 2
    s *= 1e-4 * math.sqrt(m * n) / s.norm()
    w0 = (SIGMA * gaussian(m, n)).bfloat16()
    drawn = sizes.null_draws(w0, s, 1.0, torch.Generator().manual_seed(0))
    generator, direct = torch.Generator().manual_seed(1), []
    for _ in range(16):
        u, v = sizes.orthonormal(m, len(s), generator), sizes.orthonormal(n, len(s), generator)
        direct.append(sizes.compare(w0, (u * s) @ v.T, w0).s1)
    spread = math.hypot(np.std(direct), drawn.spectrum.std()) / 4
    assert abs(drawn.spectrum.mean() - np.mean(direct)) < 4 * spread
    block = sizes.null_block(s, 96 if m <= n else 64, min(shape), max(shape), generator)
    assert block.square().mean().sqrt().item() == pytest.approx(1e-4, rel=0.15)


def test_sampled_rows_and_columns_stand_for_all():
    """Weights of very different size by rows and columns: what is drawn is 1024 x 1024 of 1400 x 1100 entries."""
    scale = torch.linspace(-3, 0, 1400).exp()[:, None] * torch.linspace(0, -2, 1100).exp()
    w0 = (SIGMA * gaussian(1400, 1100) * scale).bfloat16()
    inside = 0
    for seed in range(3):
        delta, s = low_rank(1400, 1100, 8, 1e-5, seed=seed, decay=0.7)
        found, _, _ = excess_of(w0, delta, s, seed=seed)
        inside += found["low"] <= 0 <= found["high"]
        assert abs(found["excess"]) < 0.01 and found["high"] - found["low"] < 0.05
    assert inside >= 2


def test_an_update_that_cannot_be_larger_than_the_grid_has_no_excess():
    w0 = torch.ones(64, 64).bfloat16()
    delta, s = low_rank(64, 64, 4, 1e-9)
    found, _, _ = excess_of(w0, delta, s)
    assert found == {"excess": 0.0, "low": 0.0, "high": 0.0, "null": 1.0}


# ---------------------------------------------------------------- spectra


def test_spectrum_of_factors_is_that_of_their_product():
    b, a = gaussian(200, 8), gaussian(8, 120, seed=1)
    assert torch.allclose(spectra.factor_spectrum(b, a, 0.5), torch.linalg.svdvals(0.5 * b @ a)[:8], rtol=1e-4)
    delta = 0.5 * b @ a
    assert torch.allclose(spectra.full_spectrum(delta)[:8], torch.linalg.svdvals(delta)[:8], rtol=1e-4)


def test_ranks_of_known_spectra():
    equal = spectra.rank_summary(torch.ones(5), 8)
    assert [equal[k] for k in sorted(equal)] == pytest.approx([5, 5, 8, 5])
    one = spectra.rank_summary(torch.tensor([3.0, 0, 0, 0]), 4)
    assert one["R1_effective_rank"] == one["R1_stable_rank"] == one["R1_participation_ratio"] == pytest.approx(1)
    two = spectra.rank_summary(torch.tensor([2.0, 1.0]), 2)
    assert two["R1_stable_rank"] == pytest.approx(1.25) and two["R1_participation_ratio"] == pytest.approx(25 / 17)
    assert two["R1_effective_rank"] == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert spectra.rank_summary(torch.zeros(4), 4)["R1_effective_rank"] is None


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_principal_measures_against_full_decompositions(shape):
    w0, delta = gaussian(*shape), 0.3 * gaussian(*shape, seed=1)
    found, masks = spectra.principal(w0, delta)
    u0, s0, v0 = torch.linalg.svd(w0.double(), full_matrices=False)
    u1, s1, v1 = torch.linalg.svd((w0 + delta).double(), full_matrices=False)
    k, d = 6, delta.double()
    cosines = (u0.T @ u1[:, :10]).abs().amax(0)
    assert found["R2_margin"] == pytest.approx(cosines.min().item() - 0.5, abs=1e-6)
    assert found["R2_intruders"]["0.7"] == int((cosines < 0.7).sum())
    assert found["U1_rel_spectral"] == pytest.approx((torch.linalg.svdvals(d)[0] / s0[0]).item(), rel=1e-6)
    total = d.square().sum()
    assert found["G1_left"]["share"] == pytest.approx(((u0[:, :k].T @ d).square().sum() / total).item(), rel=1e-6)
    assert found["G1_right"]["share"] == pytest.approx(((d @ v0[:k].T).square().sum() / total).item(), rel=1e-6)
    assert found["G1_both"]["share"] == pytest.approx(
        ((u0[:, :k].T @ d @ v0[:k].T).square().sum() / total).item(), rel=1e-6
    )
    assert found["G1_left"]["random"] == k / shape[0] and found["G1_right"]["random"] == k / shape[1]
    for key, p, q in (("G2_left_angle", u0[:, :k], u1[:, :k]), ("G2_right_angle", v0[:k].T, v1[:k].T)):
        angle = torch.rad2deg(torch.linalg.svdvals(p.T @ q).clamp(max=1).acos())
        assert found[key]["max"] == pytest.approx(angle.max().item(), abs=1e-4)
    assert found["G2_spectral_shift"] == pytest.approx(((s1 - s0).norm() / s0.norm()).item(), rel=1e-6)
    rank_k = ((u0[:, :k] * s0[:k]) @ v0[:k]).abs()
    assert (masks["G3_principal"] == (rank_k > rank_k.median())).float().mean() > 0.999
    assert masks["G3_low_magnitude"].float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shape", [(128, 64), (64, 128)])
def test_a_planted_intruder_is_counted_and_its_distance_measured(shape):
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    u, v = sizes.orthonormal(m, 64, generator)[:, :64], sizes.orthonormal(n, 64, generator)
    w0 = (u * torch.linspace(10, 1, 64)) @ v.T
    away = torch.nn.functional.normalize(u.sum(1), dim=0)  # cosine 1/8 with every left singular vector
    planted = 20 * torch.outer(away, v[:, -1])
    found, _ = spectra.principal(w0, planted)
    assert found["R2_intruders"]["0.5"] == 1 and found["R2_critical_scale"] == 1.0 and found["R2_margin"] < 0
    small, _ = spectra.principal(w0, planted / 100)
    assert small["R2_intruders"]["0.9"] == 0 and small["R2_margin"] > 0.4
    scale = small["R2_critical_scale"]
    assert 1 < scale < 100
    assert spectra.principal(w0, planted / 100 * scale)[0]["R2_intruders"]["0.5"] >= 1
    assert spectra.principal(w0, planted / 100 * scale / 1.5)[0]["R2_intruders"]["0.5"] == 0


def test_small_angles_are_not_lost_to_rounding():
    p = torch.eye(50, 3, dtype=torch.float64)
    q = p.clone()
    q[0, 0], q[10, 0] = math.cos(1e-7), math.sin(1e-7)
    assert spectra.angles(p, q)["max"] == pytest.approx(math.degrees(1e-7), rel=1e-6)
