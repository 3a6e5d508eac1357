"""Sampling: rows a second of the table generators, sequences a second of an autoregressive decoder.

The networks are not trained; they have the sizes of a run's on the 48 columns of diabetes130, of which the schema alone
is read. Rows are streamed as `synthward sample` streams them, typed columns in order, without the file; beside that
stands what the generator does alone, by size of chunk. The whole command on a CPU, file and start included, is
`python -m benchmarks.sampling`. No generator of the package is autoregressive: the decoder is that of
`synthward.run.decoder`, and keys and values of earlier places are kept.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import interleaved, spread, timed
from benchmarks.gpu.models import initialise_decoder
from benchmarks.gpu.section import Job, Options, Section
from synthward.encoding import TableEncoder
from synthward.encoding.encoder import CONTINUOUS_BINS, MAX_RECORDS_COUNTED, is_token_column, level_count
from synthward.engine.draws import Draws, sampling_key
from synthward.generators.registry import build_generator, make_settings
from synthward.run.cohort import CHUNK_ROWS, CohortSampler
from synthward.run.decoder import DECODERS, Decoder, DecoderShape
from synthward.schema import load_schema

SCHEMA = Path(__file__).parents[1] / "schemas" / "diabetes130.toml"
GENERATORS = ("diffusion", "gan")
CHUNKS = (CHUNK_ROWS, 16 * CHUNK_ROWS)
_STREAM_SECONDS = 4.0
_ENDLESS = 1 << 40


def encoder_of(schema: Any) -> TableEncoder:
    """The encoding of a table whose values are all equally common; no record is read."""
    bins = [level_count(c) if is_token_column(c) else CONTINUOUS_BINS for c in schema.modelled]
    parts = [np.full(count + 1, 1000.0) for count in bins]
    per_unit = np.zeros(MAX_RECORDS_COUNTED + 1)
    per_unit[1:4] = 10000.0
    return TableEncoder._from_histograms(schema, [*parts, per_unit, np.array([30000.0])], 0.0)


def sampler_of(name: str, device: str) -> CohortSampler:
    """A generator of default size on a device, untrained."""
    torch.manual_seed(0)
    schema = load_schema(SCHEMA)
    encoder = encoder_of(schema)
    generator = build_generator(name, encoder.layout, encoder.token_mass, make_settings(name, {}))
    return CohortSampler(schema, encoder, generator.to(torch.device(device)))


def stream_rate(sampler: CohortSampler, seconds: float) -> dict[str, Any]:
    """Rows that come out of the stream in some seconds, after its first batches."""
    stream: Iterator[Any] = sampler.batches(1, 0, _ENDLESS)
    try:
        for _ in range(torch.get_num_threads()):
            next(stream)
        begun, rows = time.perf_counter(), 0
        while True:
            rows += next(stream).num_rows
            took = time.perf_counter() - begun
            if took >= seconds:
                return {"rows": rows, "seconds": took, "rows_per_second": rows / took}
    finally:
        stream.close()  # type: ignore[attr-defined]


def table_rows(name: str, options: Options) -> dict[str, Any]:
    """Rows a second, streamed and by the generator alone, on the device and on this machine's CPU."""
    seconds = _STREAM_SECONDS if timed() else 0.0
    row: dict[str, Any] = {"what": "rows", "generator": name, "threads": torch.get_num_threads()}
    row["trained"] = False
    for device in dict.fromkeys((options.device, "cpu")):
        sampler = sampler_of(name, device)
        found = stream_rate(sampler, seconds)
        row[device] = {"streamed": found if timed() else {"rows": found["rows"]}}
        if device == options.device:
            row["shape"] = f"{len(sampler.schema.modelled)} columns, chunks of {CHUNK_ROWS} rows"
            chunks = (64,) if options.small else CHUNKS
            row[device]["alone"] = {str(rows): _alone(sampler, rows) for rows in chunks}
    return row


def _alone(sampler: CohortSampler, rows: int) -> dict[str, Any]:
    """The generator's network and random numbers, without typed columns."""
    device = sampler.generator.device
    context = torch.zeros(rows, dtype=torch.int64, device=device)
    key = sampling_key(1)

    def run() -> None:
        sampler.generator.sample(context, Draws(key).to(device), None)

    with torch.inference_mode():
        found = spread(interleaved({"": run}, 20, 3.0, flush=False)[""])
    return {**found, "rows_per_second": rows / found["seconds"]} if found else {}


class CachedDecoder:
    """Draws sequences place by place; keys and values of earlier places are kept, [layers, 2, B, heads, T, head]."""

    def __init__(self, network: Decoder, batch: int, dtype: torch.dtype) -> None:
        self._network, self._batch, self._dtype = network, batch, dtype
        self._device = network.tokens.weight.device
        self.times, width = network.places.weight.shape
        block = network.blocks[0]
        shape = (len(network.blocks), 2, batch, block.heads, self.times, width // block.heads)
        self._kept = torch.zeros(shape, dtype=dtype, device=self._device)

    def logits(self, ids: Tensor, place: int) -> Tensor:
        """Of the token after `ids` int64 [B], which stand at `place`: [B, vocab]."""
        network = self._network
        x = network.tokens(ids) + network.places.weight[place]
        for block, kept in zip(network.blocks, self._kept, strict=True):
            q, k, v = block.qkv(block.norm1(x)).view(len(ids), 3, block.heads, -1).unbind(1)
            kept[0, :, :, place], kept[1, :, :, place] = k, v
            known = kept[:, :, :, : place + 1]
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2).to(kept.dtype), known[0], known[1])
            x = x + block.out(mixed.flatten(1))
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        out: Tensor = network.head(network.norm(x))
        return out

    def draw(self) -> Tensor:
        """Token ids int64 [B, T], in CPU memory."""
        ids = torch.zeros(self._batch, self.times, dtype=torch.int64, device=self._device)
        last = ids[:, 0]
        for place in range(self.times - 1):
            logits = self.logits(last, place).float()
            # The largest of logits with Gumbel noise is a draw of their softmax.
            noise = torch.empty_like(logits).exponential_().log_().neg_()
            last = (logits + noise).argmax(1)
            ids[:, place + 1] = last
        return ids.cpu()


_SMALL = DecoderShape(layers=2, width=16, heads=2, vocab=50, times=6, tied=1)
_SHAPES = {
    "ehr": (DecoderShape(layers=2, width=256, heads=4, vocab=20000, times=64), 4096),
    "gpt2-small": (DECODERS["gpt2-small"], 256),
}


def sequences(name: str, options: Options) -> dict[str, Any]:
    """Sequences a second, by autocast to bf16 over fp32 weights, batch by batch into CPU memory."""
    shape, batch = (_SMALL, 3) if options.small else _SHAPES[name]
    torch.manual_seed(0)
    with torch.device(options.device):
        network = initialise_decoder(Decoder(shape))
    decoder = CachedDecoder(network, batch, torch.bfloat16)
    with torch.inference_mode(), torch.autocast(options.device, torch.bfloat16):
        found = spread(interleaved({"": decoder.draw}, 10, 6.0, flush=False)[""])
    row = {
        "what": "sequences",
        "trained": False,
        "batch": batch,
        "shape": f"[{batch}, {shape.times}] tokens of {shape.vocab}, {shape.layers} layers of {shape.width}",
        **found,
    }
    if found:
        row["sequences_per_second"] = batch / found["seconds"]
        row["tokens_per_second"] = batch * shape.times / found["seconds"]
    return row


def _jobs(options: Options) -> list[Job]:
    runs: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        name: (20.0, functools.partial(table_rows, name, options)) for name in GENERATORS
    }
    runs |= {f"decoder {name}": (25.0, functools.partial(sequences, name, options)) for name in _SHAPES}
    return [Job(name, seconds, run) for name, (seconds, run) in runs.items()]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for job, row in rows.items():
        if row["what"] == "sequences":
            rate = row.get("sequences_per_second", math.nan)
            said = f"{rate:.4g} sequences/s, {row['shape']}" if "seconds" in row else "ran"
        else:
            said = ", ".join(
                f"{device} {part['streamed'].get('rows_per_second', math.nan):.4g} rows/s streamed"
                + "".join(
                    f", {found['rows_per_second']:.4g} alone by {size}"
                    for size, found in part.get("alone", {}).items()
                    if found
                )
                for device, part in row.items()
                if isinstance(part, dict) and "rows_per_second" in part["streamed"]
            )
        lines.append(f"{job}: {said or 'ran'}")
    return "\n".join(lines)


SECTION = Section("sampling", "sampling from untrained networks", _jobs, _table)
