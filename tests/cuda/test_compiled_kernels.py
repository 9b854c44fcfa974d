"""The Triton kernels of a decode step as machine code for cards from Ampere to Blackwell, without a card."""

import pytest

triton = pytest.importorskip("triton", reason="no Triton, whose kernels these are (pip install triton)")

import performance_page
from azr.machine.plan import QWEN25
from compiled_kernels import LIMITS, compile_for


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Compiled here, not found in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("model", performance_page.MODELS)
def test_nothing_spills_and_shared_memory_suffices(model, capability):
    reports = compile_for(capability, QWEN25[model])
    for name, report in reports.items():
        assert report.spilled == 0 and report.registers <= 128, (name, report)
        assert report.shared <= LIMITS[capability][0] << 10 and report.programs(capability) >= 2, (name, report)
    assert [name for name, report in reports.items() if report.tensor_cores] == ["splits"]


def test_the_page_shows_these_kernels():
    if triton.__version__ != performance_page.COMPILED_WITH:
        pytest.skip(f"the page is made with Triton {performance_page.COMPILED_WITH}, not {triton.__version__}")
    shown = performance_page.section(performance_page.PAGE.read_text(encoding="utf-8"), "compiled")
    assert shown == performance_page.counted("compiled"), (
        "docs/performance.md is old: python tests/cuda/performance_page.py --write"
    )
