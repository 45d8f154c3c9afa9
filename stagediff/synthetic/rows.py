"""The steps planted-tokenizer and planted-tokens: artificial words, and rows of them in segments of one topic each."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.lm.tokens import ROW_COLUMNS
from stagediff.synthetic.spec import PlantedTokenizerSpec, PlantedTokensSpec
from stagediff.synthetic.world import BLOCK_ROWS, STREAMS, Planted

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["TOPICS", "tokenizer", "tokens", "word"]

TOPICS = "topics"
UNKNOWN = "?"


def word(i: int) -> str:
    """The i-th artificial word."""
    return f"w{i}"


def tokenizer(spec: PlantedTokenizerSpec, job: "Job") -> dict[str, Any]:
    """Writes a word-level tokenizer in the hub's layout: token i is w<i>, the last one stands for all other text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word(i): i for i in range(spec.vocab)}
    made = Tokenizer(models.WordLevel({**words, UNKNOWN: spec.vocab}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    job.writer.write_bytes("tokenizer.json", made.to_str(pretty=True).encode())
    job.writer.write_json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN})
    return {"vocab": spec.vocab + 1}


def tokens(spec: PlantedTokensSpec, job: "Job") -> dict[str, Any]:
    """Writes the arrays "rows" [rows, context] and "topics" [rows, context, STREAMS], int32, and rows.parquet."""
    planted = Planted(spec.world)
    shapes = {"rows": (spec.rows, spec.context), TOPICS: (spec.rows, spec.context, STREAMS)}
    with job.progress.task("planted rows", 2 * spec.rows, "rows") as task:
        for part, (name, shape) in enumerate(shapes.items()):
            array = job.writer.array(name, shape=shape, dtype="int32", chunk_rows=BLOCK_ROWS, shard_rows=BLOCK_ROWS)
            for block in array.pending():
                array.write_shard(block, planted.rows(spec.split, block)[part][: array.rows_of(block)])
                task.advance(array.rows_of(block))
    n = spec.rows
    source = pd.Categorical.from_codes(np.zeros(n, np.int8), categories=pd.Index(["planted"]))
    frame = pd.DataFrame({"row": np.arange(n), "document": np.arange(n), "source": source, "is_new": np.zeros(n, bool)})
    job.writer.write_table("rows.parquet", frame, columns=ROW_COLUMNS)
    return {"rows": n, "tokens": n * spec.context, "vocab": planted.vocab, "topics": planted.topics}
