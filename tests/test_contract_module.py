"""The contract on the module of every registered attention variant, encoder and decoder; none is named here."""

import pytest
from contract import CHECKS, Subject

from hf_efficient_attn import available_variants


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("name", list(available_variants("attention")))
@pytest.mark.parametrize("check", list(CHECKS))
def test_contract(check: str, name: str, causal: bool) -> None:
    CHECKS[check](Subject(name, causal, oracle=name))
