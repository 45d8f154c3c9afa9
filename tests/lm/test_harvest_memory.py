"""Memory of a harvest and of reading it: bounded by shard and batch, whatever the number of rows."""

from typing import Any

import numpy as np
import pytest
from peak import peak_mib

from stagediff.lm import sources
from stagediff.lm.spec import HarvestSpec, HookPoint

CODE = """
import sys
from stagediff import steps
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HarvestSpec
from stagediff.store import Store
spec, store = HarvestSpec.model_validate_json(sys.argv[2]), Store(sys.argv[1])
steps.run(spec, store, device="cpu")
reader = ActivationReader(store, ActivationData(base=spec.ref, rows=spec.rows))
for i in range(reader.n_shards):
    reader.read_shard(i)
"""


@pytest.mark.slow
def test_memory_of_harvest_and_reading_does_not_grow_with_the_rows(save_tiny: Any, store: Any, put_rows: Any) -> None:
    model = sources.resolve_model(name=str(save_tiny("gpt_neox", hidden_size=256, intermediate_size=64)))
    peaks = []
    for rows in (2_000, 16_000):  # 32 MB and 254 MB of activations in shards of 1 MB
        tokens = put_rows(np.random.default_rng(rows).integers(0, 97, (rows, 32)).astype(np.int32))
        spec = HarvestSpec(model=model, tokens=tokens, rows=rows, hook=HookPoint(layer=0), batch_rows=64, shard_rows=64)
        peaks.append(peak_mib(CODE, store.root, spec.model_dump_json()))
    assert peaks[1] - peaks[0] < 30, f"peak memory {peaks} MiB"
