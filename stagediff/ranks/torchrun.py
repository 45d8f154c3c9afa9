"""torchrun that ends when the process that started it does: `python -m stagediff.ranks.torchrun` instead of `-m torch.distributed.run`."""

import os

from stagediff.ranks.tree import PARENT, die_with_parent

if __name__ == "__main__":
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())  # for the ranks
    from torch.distributed.run import main

    main()
