"""Which token stands at every probe position: ids, and the strings by which two tokens count as one.

A string is what the tokenizer decodes the id to; a piece of a character, which decodes to nothing readable, keeps the vocabulary's own string.
Folded (KindRule.fold_tokens), strings are compared without white space around and without case; a string of white space alone stays as it is.
"""

from typing import TYPE_CHECKING

import numpy as np

from stagediff.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ProbeTokens", "token_names"]

REPLACEMENT = "\ufffd"


class ProbeTokens:
    """Token ids [rows, context] (4 bytes a token: 16 MiB for 4 M probe tokens) and the tokens they count as.

    Attributes: `ids` [rows, context] int32; `names`, the distinct token strings; `codes` [rows, context] int32, the string of each position
    as an index into `names`.
    """

    def __init__(self, ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase", *, fold: bool):
        """Raises UserError where the tokenizer does not know an id."""
        self.ids = ids
        known, inverse = np.unique(ids, return_inverse=True)
        of_id = token_names(tokenizer, known, fold=fold)
        self.names = sorted(set(of_id))
        index = {name: i for i, name in enumerate(self.names)}
        self.codes = np.array([index[name] for name in of_id], np.int32)[inverse].reshape(ids.shape)


def token_names(tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray, *, fold: bool) -> list[str]:
    """The string each of these distinct ids is compared by, [len(ids)]. Unfolded they are all different."""
    own = tokenizer.convert_ids_to_tokens(ids.tolist())
    if unknown := [int(i) for i, name in zip(ids, own, strict=True) if name is None]:
        raise UserError(
            f"The probe rows hold token ids that the tokenizer does not know ({', '.join(map(str, unknown[:3])) + (', …' if unknown[3:] else '')}; its "
            f"vocabulary has {len(tokenizer)}): they were made with another one. Name the tokenizer of the probe's token rows."
        )
    texts = [str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]
    texts = [name if REPLACEMENT in text or not text else text for text, name in zip(texts, own, strict=True)]
    if fold:
        return [text.strip().casefold() or text for text in texts]
    repeated = {text for text in texts if texts.count(text) > 1} if len(set(texts)) < len(texts) else set()
    return [name if text in repeated else text for text, name in zip(texts, own, strict=True)]
