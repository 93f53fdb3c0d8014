"""Fixtures for the tests of Kronecker factors."""

from __future__ import annotations

import pytest
from oracles import llama_oracle
from support import llama_batch, tiny_llama
from torch import Tensor


@pytest.fixture(scope="module")
def llama_expected() -> dict[str, dict[str, Tensor]]:
    return llama_oracle(tiny_llama(), llama_batch())
