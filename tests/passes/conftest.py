"""Networks that the tests of the passes share; every pass must take and give a well-formed module."""

from collections.abc import Iterator

import pytest
import tvm
from tvm.relax.ir.instrument import WellFormedInstrument

from tests.passes.torch_networks import Branches, Example, Gated, Residual, Sequential, example


@pytest.fixture(autouse=True)
def well_formed() -> Iterator[None]:
    with tvm.transform.PassContext(instruments=[WellFormedInstrument()]):
        yield


@pytest.fixture(scope="session")
def sequential() -> Example:
    return example(Sequential())


@pytest.fixture(scope="session")
def residual() -> Example:
    return example(Residual())


@pytest.fixture(scope="session")
def branches() -> Example:
    return example(Branches())


@pytest.fixture(scope="session")
def gated() -> Example:
    return example(Gated())
