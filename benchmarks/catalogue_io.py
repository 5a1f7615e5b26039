"""Time and peak memory of what holds a catalogue: the item <-> SID map, vectors from files, TF-IDF.

    python benchmarks/catalogue_io.py [--items 1000000] [--dim 384] [--folder /tmp]

Each measurement is a process of its own on one thread; its memory is the growth of the peak (VmHWM, Linux) over what
the imports and the list of item ids take. Data are made: random vectors and codes, titles of eight words out of 20,000.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerankkit.stages.sids import SidMap, SidTable

START = """
import time
from pathlib import Path
import pyarrow.compute, pyarrow.ipc, pyarrow.parquet
from rerankkit import SidMap
from rerankkit.data.embed import Tfidf, read_vectors
import rerankkit.data.tables, sklearn.decomposition, sklearn.feature_extraction.text

def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, num, into = Path({folder!r}), {num}, Path({folder!r}) / "into.npy"
item_ids = [f"B{{n:09d}}" for n in range(num)]
before, start = peak(), time.perf_counter()
def tell(what):
    print(f"{{what:<44}} {{time.perf_counter() - start:6.1f}} s   +{{peak() - before:6.0f}} MiB", flush=True)
"""
MAP = """
sids = SidMap.load(folder)
tell("SidMap.load")
sid = sids.sid_of("B000000777")
tell("  and the first sid_of")
assert "B000000777" in sids.items_of(sid)
tell("  and the first items_of")
many = time.perf_counter()
for item_id in item_ids[:10_000]:
    sids.items_of(sids.sid_of(item_id))
print(f"  then, both ways: {(time.perf_counter() - many) * 100:.0f} us an item")
"""
READ = """
read_vectors(folder / "{name}", num, item_ids, into=into)
tell("read_vectors {name}")
"""
TEXTS = """
import numpy as np
rng = np.random.default_rng(0)
texts = [" ".join(f"w{w}" for w in row) for row in (20_000 * rng.random((num, 8)) ** 3).astype(int)]
before, start = peak(), time.perf_counter()
space = Tfidf.fit(texts)
tell("Tfidf.fit (on 100,000 of them)")
space.vectors(texts, into=into)
tell("  and Tfidf.vectors")
"""


def main() -> None:
    """Write the files, then measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", default=None, help="where the files go for the while")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        _write(folder, asked.items, asked.dim)
        array = asked.items * asked.dim * 4 / 2**20
        print(f"{asked.items:,} items; an array [N, {asked.dim}] of float32 is {array:,.0f} MiB")
        reads = [READ.replace("{name}", file) for file in ("f32.npy", "f64.npy", "v.parquet", "v.arrow")]
        for code in (MAP, *reads, TEXTS):
            program = START.format(folder=str(folder), num=asked.items) + code
            subprocess.run([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def _write(folder: Path, num: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    item_ids = [f"B{n:09d}" for n in range(num)]
    SidMap(SidTable(item_ids, rng.integers(0, 256, (num, 4))), (256,) * 4, {}).save(folder)
    schema = pa.schema([("item_id", pa.string()), ("embedding", pa.list_(pa.float32()))])
    maps = [np.lib.format.open_memmap(folder / f"f{bits}.npy", "w+", f"f{bits // 8}", (num, dim)) for bits in (32, 64)]
    with (
        pq.ParquetWriter(folder / "v.parquet", schema) as parquet,
        pa.OSFile(str(folder / "v.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as arrow,
    ):
        for start in range(0, num, 100_000):
            ids = item_ids[start : start + 100_000]
            part = rng.standard_normal((len(ids), dim), dtype=np.float32)
            for found in maps:
                found[start : start + len(ids)] = part
            lists = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), dim).cast(pa.list_(pa.float32()))
            rows = pa.table([pa.array(ids), lists], schema=schema)
            parquet.write_table(rows)
            arrow.write_table(rows)


if __name__ == "__main__":
    main()
