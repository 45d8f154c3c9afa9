"""What is compiled ahead is all that trainings use, so that none compiles later."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from stagediff.sae.dictionary import ARCHITECTURES
from stagediff.sae.initial import fresh
from stagediff.sae.sparse import cpu_gradients, cpu_select, cpu_update
from stagediff.sae.sparse.first_use import compile_kernels
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

def compiled():
    found = {f"{m.__name__}.{n}": k for m in (cpu_gradients, cpu_select, cpu_update) for n, k in vars(m).items() if hasattr(k, "signatures")}
    return {name: sorted(map(str, kernel.signatures)) for name, kernel in found.items()}

compile_kernels()
before = compiled()
for architecture in ARCHITECTURES:
    for more in ({}, {"decoder_norm": "free"}, {"subtract_b_dec": False}):
        for compute in (torch.bfloat16, torch.float32):
            for anchor in (0.0, 0.5):
                config = DictionaryConfig(architecture=architecture, features=512, k=8, dead_after=600, **more)
                sae = fresh(config, 1.0, torch.zeros(24), seed=1)
                if sae.k is None:
                    sae.b_enc -= 6.0
                sae.b_enc[300:] = -50.0
                trainer = Trainer(sae, Budget(tokens=20 * 300, batch=300, clip=0.0 if anchor else 1.0), 20, True, compute, anchor=anchor)
                for i in range(20):
                    trainer.train_on(3 * torch.randn(300, 24))
print(json.dumps({"before": before, "after": compiled()}))
"""


@pytest.mark.slow
def test_no_training_compiles_what_was_not_compiled_ahead():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == found["after"]
    public = [
        name for name in found["before"] if not name.split(".")[-1].startswith("_") and name.split(".")[-1] not in ("widened", "narrowed")
    ]
    assert len(public) > 10
    assert not [name for name in public if not found["before"][name]]
