"""One process of a variant of `benchmarks.rank_steps`, as `benchmarks.worker` is one of a step's.

    python -m benchmarks.rank_worker MODEL VARIANT RANK RANKS MEETING

MEETING: a file where the processes of a group find each other; `-`: they form none.
"""

from __future__ import annotations

import sys


def main(model: str, variant: str, rank: int, ranks: int, meeting: str) -> None:
    import torch.distributed as dist

    from benchmarks.rank_steps import Share, make_step
    from benchmarks.worker import serve, warm_up

    warm_up()
    if meeting != "-":
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    serve(lambda: make_step(model, variant, Share(rank, ranks)))
    if meeting != "-":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
