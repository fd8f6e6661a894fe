"""How fast a training reads latents from an object store that is far away and fails now and then.

    pip install --target /opt/clients-s3 "moto[server]" s3fs
    PYTHONPATH=/opt/clients-s3 python benchmarks/object_store.py [--quick]

The store is moto's server on this machine, which answers with a delay and at a limited rate, each connection for
itself. One request in twenty fails: by a 503, by a body that ends early, and by one with a changed byte in turn. Shards
hold 512 latents (4, 32, 32) in half precision, 4 MiB; batches have 128 of 8 shards. A step takes 50 ms, in which
nothing is computed, as though an accelerator were at work. "Ahead" is what a training does; the others are data that
do not know how to read ahead, in the training process or in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tinyfusion_core.dataloading.loader import load_batches
from tinyfusion_core.dataloading.order import order_of
from tinyfusion_core.dataloading.shards import FORMAT_VERSION, METADATA, write_shard
from tinyfusion_core.protocols.data import Samples
from tinyfusion_dit import Latents

SHAPE, SHARD, BATCH, STEP = (4, 32, 32), 512, 128, 0.05
DELAYS = {"local folder": None, "store, no delay": 0.0, "store, 0.1 s": 0.1, "store, 0.5 s": 0.5}
RATE = 50e6
"""Bytes per second of a connection."""
FAILS = 20
"""One request in so many fails."""
BUCKET = "latents"


@dataclass(frozen=True)
class Plain:
    """Samples that cannot read ahead."""

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.samples.__getitems__(indices)


WAYS: dict[str, tuple[Callable[[Samples], Samples], int]] = {
    "when asked for": (Plain, 0),
    "by one process": (Plain, 1),
    "by two processes": (Plain, 2),
    "ahead": (lambda samples: samples, 0),
}


def serve(port: int) -> None:
    """Be the store: moto's application, slower and less reliable."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    how: dict[str, float] = {"delay": 0.0, "fails": 0}
    counts: Counter[str] = Counter()

    def slowly(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/how/"):
            _, _, delay, fails = path.split("/")
            how.update(delay=float(delay), fails=int(fails))
            said = json.dumps(counts).encode()
            counts.clear()
            start("200 OK", [("Content-Type", "application/json")])
            return [said]
        if environ["REQUEST_METHOD"] != "GET" or not path.endswith(".safetensors"):
            return app(environ, start)
        counts["read"] += 1
        kind = counts["read"] // FAILS % 3 if how["fails"] and counts["read"] % FAILS == 0 else None
        time.sleep(how["delay"])
        if kind == 0:
            counts["refused"] += 1
            start("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"slow down"]
        content = b"".join(app(environ, start))
        if how["delay"]:
            time.sleep(len(content) / RATE)
        if kind == 1:
            counts["cut"] += 1
            return [content[: len(content) // 2]]
        if kind == 2:
            counts["changed"] += 1
            return [content[:-1] + bytes([content[-1] ^ 1])]
        return [content]

    run_simple("127.0.0.1", port, slowly, threaded=True)


def set_store(port: int, delay: float, fails: bool) -> dict[str, int]:
    """Say how the store behaves; returns what it has counted until now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/how/{delay}/{int(fails)}") as answer:
        found: dict[str, int] = json.load(answer)
    return found


def steps(url: str, way: str, num: int) -> Iterator[float]:
    """Seconds that each step waits for its batch."""
    samples, (made, workers) = Latents(folder=url, num_held_out=BATCH).train(), WAYS[way]
    order = order_of(samples, 0, "benchmark", BATCH)
    before = time.perf_counter()
    for loaded in load_batches(made(samples), order.steps(0, num, 0, BATCH), workers):
        assert loaded.batch is not None and not loaded.problems, loaded.problems
        assert torch.equal(loaded.batch["x"][:, 0, 0, 0], loaded.batch["y"].float())
        yield time.perf_counter() - before
        time.sleep(STEP)
        before = time.perf_counter()


def write(folder: Path, num: int) -> None:
    """Latents whose first number says their label."""
    shards, source = [], torch.Generator().manual_seed(0)
    for i in range(0, num, SHARD):
        x, y = torch.randn(SHARD, *SHAPE, generator=source).half(), torch.arange(SHARD) % 10
        x[:, 0, 0, 0] = y
        shards.append(write_shard(folder, f"{i:07d}.safetensors", {"x": x, "y": y}))
    metadata = {"format_version": FORMAT_VERSION, "kind": "sample", "shards": [asdict(shard) for shard in shards]}
    (folder / METADATA).write_text(json.dumps(metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    parser.add_argument("--port", type=int, default=5055)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.port)
        return
    num = 80 if options.quick else 320
    os.environ |= {"FSSPEC_S3_KEY": "k", "FSSPEC_S3_SECRET": "s"}
    os.environ["FSSPEC_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{options.port}"
    import fsspec

    command = [sys.executable, __file__, "--serve", "--port", str(options.port)]
    with TemporaryDirectory() as place, subprocess.Popen(command, stderr=subprocess.DEVNULL) as store:
        try:
            write(Path(place), 64 * SHARD)
            while True:
                try:
                    set_store(options.port, 0, False)
                    break
                except OSError:
                    assert store.poll() is None, "the store has ended"
                    time.sleep(0.2)
            files = fsspec.filesystem("s3")
            files.mkdir(BUCKET)
            files.put(f"{place}/*", f"s3://{BUCKET}/")
            print("| samples in | read | samples/s | longest wait, s | share of waiting | files read |")
            print("|---|---|---|---|---|---|")
            for name, delay in DELAYS.items():
                for way in WAYS:
                    row(name, delay, way, num, options.port, place)
        finally:
            store.terminate()


def row(name: str, delay: float | None, way: str, num: int, port: int, place: str) -> None:
    """Read, and print what came of it."""
    set_store(port, delay or 0.0, bool(delay))
    began = time.perf_counter()
    waits = list(steps(place if delay is None else f"s3://{BUCKET}", way, num))
    seconds = time.perf_counter() - began
    counts = set_store(port, 0.0, False)
    failed = sum(n for kind, n in counts.items() if kind != "read")
    read = f"{counts.get('read', 0)}, {failed} failed" if delay is not None else ""
    print(
        f"| {name} | {way} | {num * BATCH / seconds:,.0f} | {max(waits[1:]):.2f} | {sum(waits) / seconds:.0%} | "
        f"{read} |",
        flush=True,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
