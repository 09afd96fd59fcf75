"""StreamingPCA for bench_svd.py: one stream, parts merged in either order, random orders, parts and trees of merges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import _common as common  # before torch
import _svd_data as data
import numpy as np
import torch
from torch import Tensor

import balanced_rep as br

Row = dict[str, Any]


def streaming(small: bool) -> list[Row]:
    """Excess of StreamingPCA on activations: one stream, parts merged in either order, random orders, parts, trees."""
    m, n, k = (600, 96, 8) if small else (2560, 640, 32)
    X = data.matrix("activations", m, n, k).double()
    C = X - X.mean(0)
    best, rows = data.best_error(C, k), []

    def measure(name: str, parts: Sequence[Tensor], tree: Sequence[Sequence[int]] = (), **options: Any) -> Row:
        start = time.perf_counter()
        workers = [br.StreamingPCA(n, k, **options).update(part) for part in parts]
        for i, j in tree or [(0, 1)] * (len(parts) - 1):
            workers[i].merge(workers[j])
            del workers[j]
        V = workers[0].finalize().components
        seconds = time.perf_counter() - start
        error = float((C - (C @ V.mT) @ V).norm() / best) - 1
        return {
            "section": "streaming", "case": f"activations {m} x {n}", "candidate": name,
            "threads": torch.get_num_threads(), "excess": common.significant(error),
            "ms": common.significant(1e3 * seconds),
        }  # fmt: skip

    name = f"incremental, keep={4 * k}"
    rows.append(measure("gram", [X]))
    for keep in (2 * k, 4 * k):
        rows.append(measure(f"incremental, keep={keep}", [X], mode="incremental", keep=keep))
    for count in (2, 4, 8, 16):
        for order, word in ((1, ""), (-1, ", backwards")):
            parts = list(X.tensor_split(count))[::order]
            rows.append(measure(f"{name}, {count} parts merged{word}", parts, mode="incremental"))
    trials = 4 if small else 16
    orders = [torch.randperm(m, generator=common.generator(i)) for i in range(trials)]
    shuffled = [measure(f"{name}, one stream shuffled", [X[order]], mode="incremental") for order in orders]
    trees = [_random_parts(m, i) for i in range(trials)]
    merged = [measure(f"{name}, random parts merged", X.split(p), tree, mode="incremental") for p, tree in trees]
    for tried in (shuffled, merged):  # chance alone moves the excess: the ends of its range
        tried.sort(key=lambda row: row["excess"])
        for row, word in ((tried[0], "least"), (tried[-1], "greatest")):
            rows.append({**row, "candidate": f"{row['candidate']}, {word} of {trials}"})
    rows.append(_sklearn_incremental(X, C, best, k))
    return rows


def _random_parts(m: int, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Lengths of 2 to 24 parts of m rows, and which of those that are left are merged, one pair after another."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 25))
    cuts = np.sort(generator.choice(np.arange(1, m), count - 1, replace=False))
    lengths = np.diff(cuts, prepend=0, append=m).tolist()
    pairs = [generator.choice(left, 2, replace=False).tolist() for left in range(count, 1, -1)]
    return lengths, [(i, j) for i, j in pairs]


def _sklearn_incremental(X: Tensor, C: Tensor, best: Tensor, k: int) -> Row:
    from sklearn.decomposition import IncrementalPCA

    start = time.perf_counter()
    V = torch.from_numpy(IncrementalPCA(k, batch_size=4 * k).fit(X.numpy()).components_)
    seconds = time.perf_counter() - start
    return {
        "section": "streaming", "case": f"activations {len(X)} x {X.shape[1]}", "candidate": "sklearn IncrementalPCA",
        "threads": torch.get_num_threads(), "ms": common.significant(1e3 * seconds),
        "excess": common.significant(float((C - (C @ V.mT) @ V).norm() / best) - 1),
    }  # fmt: skip
