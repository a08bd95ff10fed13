"""What every case uses: the machine (instruction set, threads, GPU backend) and the contest that times it.

pytest benchmarks                      everything that can run here
pytest benchmarks --results DIR        figures to DIR instead of benchmarks/results
pytest benchmarks -k forward           figures of other cases stay as they were, where the machine is the same
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.results import Case
from benchmarks.timing import CUDA_CAP, Call, CpuContestant, CudaContestant, Inputs
from jambatalk_kernels import backends, native_library

LOADED, WHY_NOT = native_library()
_CASES: pytest.StashKey[list[Case]] = pytest.StashKey()  # of the session, and of every test
_OUTCOMES: pytest.StashKey[dict[str, str | None]] = pytest.StashKey()  # of the session: test -> why skipped, or None


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process, for all contestants alike.

    By default glibc hands every large block back to the system, and taking it again page by page costs more than many
    kernels that use it, by a factor that depends on the machine's virtualisation. Nothing happens elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    mallopt(-8, 1)  # M_ARENA_MAX: the thread of the gradients would have its own heap, and give it back when empty
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=results.FOLDER, help="folder of the result files")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hasattr(config.option, "benchmark_columns"):
        config.option.benchmark_columns = ["min", "median", "rounds"]
        config.option.benchmark_name = "long"
    keep_freed_memory()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CUDA_CAP / total))
    config.stash[_CASES], config.stash[_OUTCOMES] = [], {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" or report.skipped:
        _note(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped:  # a whole module
        _note(collector.config, report)
    return report


def _note(config, report) -> None:
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
    config.stash[_OUTCOMES][report.nodeid.rpartition("/")[2]] = reason


def pytest_sessionfinish(session):
    option = session.config.option
    whole = not (option.keyword or option.markexpr or any(".py" in argument for argument in session.config.args))
    results.save(option.results, session.config.stash[_CASES], session.config.stash[_OUTCOMES], replace=whole)


def pytest_terminal_summary(terminalreporter, config):
    for line in results.summary(config.stash[_CASES]):
        terminalreporter.write_line(line)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native(one_thread):
    """The native module on one thread, with the instruction set that it chose."""
    if not LOADED:
        pytest.skip(f"no native library: {WHY_NOT}")
    import _jambatalk_native

    before = _jambatalk_native.cpu_isa()
    yield _jambatalk_native
    _jambatalk_native.set_cpu_isa(before)


@pytest.fixture(params=["avx512", "avx2"])
def isa(request, native):
    if request.param not in native.supported_cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    native.set_cpu_isa(request.param)
    return request.param


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    """The name of a GPU backend that can run here."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    reason = backends.candidates("selective_scan", torch.empty(0, device="cuda"))[request.param]
    reason = reason() if callable(reason) else reason
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def contest(request):
    """contest(case, ours, inputs, others, ...) times all in turns; ``case.seconds`` then has the best of each.

    ``others`` are peers or ceilings by name, ``peer_inputs`` what one of them takes instead of ``inputs``; one that
    fails is put on record as absent, with its error. ``threads``: by name, where not one. ``calls``: how many in one
    round, where one is too short to time. pytest-benchmark, where it is installed, times ours in the same rounds.
    """
    cases = request.node.stash[_CASES] = []

    def run(
        case: Case,
        ours: Call,
        inputs: Sequence[Inputs],
        others: dict[str, Call] | None = None,
        *,
        absent: dict[str, str] | None = None,
        peer_inputs: dict[str, Sequence[Inputs]] | None = None,
        threads: dict[str, int] | None = None,
        rounds: int = 15,
        calls: int = 1,
    ) -> None:
        def contestant(name: str, call: Call) -> CpuContestant | CudaContestant:
            mine = (peer_inputs or {}).get(name, inputs)
            if case.record["device"] == "cuda":
                return CudaContestant(call, mine)
            return CpuContestant(call, mine, calls, (threads or {}).get(name, 1))

        field = {"ours": contestant("ours", ours)}
        case.record["absent"].update(absent or {})
        for name, call in (others or {}).items():
            try:
                field[name] = contestant(name, call)
            except Exception as error:  # whatever a peer raises is part of the result
                case.record["absent"][name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        _rounds(request, field, rounds)
        case.seconds.update({name: each.best for name, each in field.items()})
        if case not in cases:
            cases.append(case)

    run.keep = cases.append  # a case whose seconds were taken otherwise
    yield run
    request.config.stash[_CASES].extend(cases)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A missed bar fails the test when it is over, with all of its figures on record."""
    result = yield
    bars = [bar for case in pyfuncitem.stash.get(_CASES, []) for bar in case.record["bars"]]
    missed = [results.bar_text(bar) for bar in bars if not bar.get("holds", True)]
    if missed:
        pytest.fail("; ".join(missed), pytrace=False)
    return result


def _rounds(request, field: dict, rounds: int) -> None:
    others = [each for name, each in field.items() if name != "ours"]

    def run_others() -> None:
        for each in others:
            each.run()

    plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark: Callable | None = request.getfixturevalue("benchmark") if plugin else None
    if benchmark is None or benchmark.disabled or benchmark.stats is not None:  # it times once per test
        for _ in range(rounds):
            run_others()
            field["ours"].run()
    else:
        benchmark.pedantic(field["ours"].run, setup=run_others, rounds=rounds)
