"""The short table at the end, of all rows that a file holds."""

from __future__ import annotations

from benchmarks.gpu import section
from benchmarks.gpu.result import Result, failures

_MOST_LINES, _WIDTH, _NAMED = 58, 150, 6


def table(result: Result, sections: list[str], not_run: dict[str, list[str]]) -> str:
    """Under 60 lines: what it was measured on, each section's own lines, what is wrong, what is missing."""
    kept = [name for name in section.NAMES if result.all_rows(name) or name in sections]
    blocks = [_section(result, name) for name in (*kept, *(n for n in sections if n not in kept))]
    tail = [f"not run, for lack of time: {name}: {_named(jobs)}" for name, jobs in not_run.items() if jobs]
    tail.append(f"{result.file}")
    lines = [_head(result), *(line for block in blocks for line in block)]
    room = _MOST_LINES - len(tail)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more lines' worth in the file"]
    return "\n".join(line[:_WIDTH] for line in (*lines, *tail))


def _head(result: Result) -> str:
    on = result.measured_on
    device, versions = on["device"], on["versions"]
    parts = [
        device["name"],
        *(f"driver {device['driver']}" for _ in range("driver" in device)),
        *(f"CUDA {device['cuda']}" for _ in range("cuda" in device)),
        *(f"{name} {versions[name]}" for name in ("torch", "triton", "synthward")),
        f"commit {(on['commit'] or 'unknown')[:12]}",
        "no TF32",
    ]
    return ", ".join(parts)


def _section(result: Result, name: str) -> list[str]:
    rows = result.all_rows(name)
    try:
        found = section.load(name)
    except ImportError as problem:
        return [f"== {name}: {problem}"]
    note = "" if result.is_current(name) or not rows else " (of another source, version or device)"
    lines = [f"== {found.title}{note}"]
    right = {job: row for job, row in rows.items() if "failed" not in row}
    if right:
        lines += [line for line in found.table(right).splitlines() if line.strip()]
    elif not rows:
        lines.append("nothing measured")
    failed = failures({job: row for job, row in rows.items() if "failed" in row})
    lines += [f"FAILED {job}: {rows[job]['failed']}" for job in failed[:_NAMED]]
    if len(failed) > _NAMED:
        lines.append(f"FAILED too: {_named(failed[_NAMED:])}")
    return lines


def _named(jobs: list[str]) -> str:
    more = f" and {len(jobs) - _NAMED} more" if len(jobs) > _NAMED else ""
    return ", ".join(jobs[:_NAMED]) + more
