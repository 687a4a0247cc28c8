"""What the tests share: kernel variants, NaN-poisoned results, hypothesis settings."""

import os

import hypothesis
import pytest
import torch
from configurations import SEED

from localattn import _library

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; tests of threads choose their own number

hypothesis.settings.register_profile(
    "localattn",
    deadline=None,  # first calls and shared machines are slow
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("localattn")


def pytest_report_header(config):
    if _library.load_error is not None:
        return f"localattn: {_library.load_error}"
    variants = ", ".join(
        v.name if v.unavailable is None else f"{v.name} ({v.unavailable})" for v in _library.variants()
    )
    return [
        f"localattn {_library.version()} ({_library.build_info()}), torch {torch.__version__}, variants: {variants}",
        f"random problems: LOCALATTN_TEST_SEED={SEED}",
    ]


CPU_VARIANTS = [v.name for v in _library.variants() if v.device == "cpu"] if _library.load_error is None else []


@pytest.fixture(params=CPU_VARIANTS)
def variant(request, monkeypatch):
    """Every variant built for the CPU, forced in turn."""
    unavailable = {v.name: v.unavailable for v in _library.variants()}[request.param]
    if unavailable is not None:
        pytest.skip(f"variant {request.param}: {unavailable}")
    monkeypatch.setenv("LOCALATTN_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory):
    """Where torch.compile keeps what it built: in one place for all, another process may load a file half written."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def poisoned_results(request):
    """Memory that torch hands out uninitialised is filled with NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    if request.node.get_closest_marker("unpoisoned") is None:
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
