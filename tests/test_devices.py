"""No variant makes a tensor on another device than its input's: without a GPU, on a device that only says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from hf_efficient_attn import available_variants

PROGRAM = Path(__file__).with_name("on_other_device.py")


CASES = 2 * len(available_variants("attention"))
COUNTS = {"modules": CASES, "long": CASES, "models": 2 * len(available_variants()) + 8, "tokens": 7}


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch makes no devices"
)
@pytest.mark.parametrize("part", COUNTS)
def test_variants_on_another_device(part: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, PROGRAM, part], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    errors = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    if part == "modules":
        assert "meets tensors on other and on cpu" in errors.pop("fault")
    if part == "long":
        assert "operators are started" in errors.pop("small steps")
    assert len(errors) == COUNTS[part]
    assert not {name: error for name, error in errors.items() if error}
