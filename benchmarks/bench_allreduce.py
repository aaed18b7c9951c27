"""Filter gradients of several ranks: the rows that occurred, or the whole matrix?

    python benchmarks/bench_allreduce.py --ranks 2 4 --classes 1000 --gates 26560

For every global batch size, an expanded minibatch is drawn and shared as
`wfnet.untraining.distributed` does it, and each rank's gradient is added up in three ways. Shown
are the bytes that a rank sends by formula, the bytes that went over the loopback interface (per
rank; with everything that the protocol adds, and whatever else uses the interface), and the median
time. Gloo on the CPU: bytes carry over to other links, milliseconds do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from script import begin, make_parser, markdown_table

from wfnet.services.files import write_json
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.distributed import bytes_sent
from wfnet.untraining.expansion import RoundRobinSampler, expand

WAYS = ("dense", "rows", "gather")


def rows_of(batch_size: int, expansion: int, classes: int, ranks: int) -> list[torch.Tensor]:
    """Returns the distinct forget labels of every rank for one expanded minibatch."""
    labels = torch.arange(classes).repeat(4)
    chosen = labels[RoundRobinSampler(labels, batch_size // 2, seed=0).batch(0)]
    batch = expand(chosen, classes, expansion, generator_for(0, 4, 0), share_images=True)
    owner = (torch.arange(len(chosen)) % ranks)[batch.source]
    return [batch.forget[owner == rank].unique() for rank in range(ranks)]


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def add(
    way: str,
    gradient: torch.Tensor,
    rows: Sequence[torch.Tensor],
    union: torch.Tensor,
    ranks: Ranks,
) -> None:
    """Sums over ranks: all rows, those that occurred on some rank, or each rank's own, gathered."""
    if way == "dense":
        ranks.add(gradient)
    elif way == "rows":
        gradient.index_copy_(0, union, ranks.add(gradient.index_select(0, union)))
    else:
        own = rows[ranks.rank]
        block = gradient.new_zeros((max(map(len, rows)), gradient.shape[1]))
        block[: len(own)] = gradient.index_select(0, own)
        blocks = [torch.empty_like(block) for _ in rows]
        dist.all_gather(blocks, block, group=ranks.host)
        gradient.index_fill_(0, union, 0)
        for part, own in zip(blocks, rows, strict=True):
            gradient.index_copy_(0, own, gradient.index_select(0, own).add_(part[: len(own)]))


def work(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/start", rank=rank, world_size=size)
    ranks, found = Ranks(), []
    for batch_size in options.batch_sizes:
        rows = rows_of(batch_size, options.expansion, options.classes, size)
        matrix = torch.zeros(options.classes, options.gates)
        matrix[rows[rank]] = torch.randn(len(rows[rank]), options.gates)
        union, most = torch.cat(rows).unique(), max(map(len, rows))
        row_bytes = 4 * options.gates
        costs = {
            "dense": bytes_sent(options.classes, row_bytes, size),
            "rows": bytes_sent(len(union), row_bytes, size),
            "gather": (size - 1) * most * row_bytes,
        }
        record = {"ranks": size, "batch_size": batch_size, "union": len(union), "most": most}
        for way in WAYS:
            seconds, on_the_wire = [], []
            for repetition in range(options.repetitions + 1):
                gradient = matrix.clone()
                ranks.wait()
                before, start = loopback_bytes(), time.perf_counter()
                add(way, gradient, rows, union, ranks)
                ranks.wait()
                if repetition:
                    seconds.append(time.perf_counter() - start)
                    on_the_wire.append((loopback_bytes() - before) / size)
            record[way] = {
                "sent": costs[way],
                "on_the_wire": round(statistics.median(on_the_wire)),
                "milliseconds": round(1e3 * statistics.median(seconds), 1),
            }
        found.append(record)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128, 512, 2048])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--gates", type=int, default=26560, help="of ResNet-50 by default")
    parser.add_argument("--expansion", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    record = begin("bench_allreduce", options, None)
    found = []
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (size, folder, options), nprocs=size)
            found += json.loads(Path(folder, "found.json").read_text())
    head = [f"{way}: MiB sent (on the wire), ms" for way in WAYS]
    rows = [
        [one["ranks"], one["batch_size"], f"{one['union']}, {one['most']}"]
        + [
            f"{one[way]['sent'] / 2**20:.1f} ({one[way]['on_the_wire'] / 2**20:.1f}), "
            f"{one[way]['milliseconds']:.0f}"
            for way in WAYS
        ]
        for one in found
    ]
    print(markdown_table(["ranks", "batch", "rows, of one rank", *head], rows))
    if options.output:
        write_json(options.output, {**record, "backend": "gloo", "records": found})


if __name__ == "__main__":
    main()
