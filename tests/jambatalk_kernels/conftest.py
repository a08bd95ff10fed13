import pytest


@pytest.fixture(params=["avx512", "avx2", "plain", "wide"])
def isa(request):
    """Every instruction set that this processor has; "wide" is the AVX-512 path lowered to plain instructions."""
    import _jambatalk_native as native

    if request.param not in native.supported_cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = native.cpu_isa()
    native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)
