"""The helpers beside the tests of formats can be imported: `made` (dictionaries of ours), `by_hand` (the other libraries' forward passes in numpy)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
