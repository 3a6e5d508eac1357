"""Checkpoints of several ranks: any number reads what any number wrote; damage is refused; a kill leaves one whole."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthward.engine.distributed.checkpoint import (
    is_saved,
    load_sharded,
    read_index,
    remove_sharded,
    save_sharded,
)
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import CheckpointError
from tests.commandline import environment
from tests.distributed import keeping
from tests.distributed.launch import run_ranks

SEEDS = range(12)
KILLS = 24
ALONE = Ranks.alone()


@pytest.mark.slow
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path):
    by_rank = run_ranks(4, keeping.every_direction, tmp_path, SEEDS)
    together: dict[tuple[int, int], int] = {}
    for compared in by_rank:
        for pair, count in compared.items():
            together[pair] = together.get(pair, 0) + count
    tensors = len(SEEDS) * len(keeping.values(0))
    # Alone: without being told, and in full. Others: also as rows, as copies and as it was; on every rank.
    ways = {1: 2, 2: 5 * 2, 4: 5 * 4}
    assert together == {(saved, size): tensors * ways[size] for saved in ways for size in ways}


def test_what_is_drawn_has_the_cases_that_matter():
    found = [value for seed in SEEDS for value in keeping.values(seed).values()]
    assert {value.dim() for value in found} == {0, 1, 2, 3}
    assert any(value.isnan().any() for value in found) and any(not value.numel() for value in found)
    assert {len(value) for value in found if value.dim()} == set(keeping.ROWS)


def test_errors_are_raised_on_all_ranks_and_said_by_one(tmp_path):
    by_rank = run_ranks(2, keeping.refusals, tmp_path)
    wanted = {
        "partial": "kept: tensor 'a' is placed as (Partial(sum),) on 2 ranks",
        "meta": "kept: tensor 'a' has no values yet",
        "complex": "kept: tensor 'a' of torch.complex64 is not kept",
        "names": "kept: the ranks hold different tensors",
        "shapes": "kept: the ranks hold different tensors",
        "one rank": "kept: tensor 'a' is placed as (Partial(sum),) on 2 ranks",
        "no folder": "not/there: can not be written (No such file or directory)",
        "full disk": "part-00001.safetensors: can not be written (No space left on device)",
        "shape": "kept: is of another run: tensor 'a' is torch.float32 [6], expected torch.float32 [5]",
        "dtype": "kept: is of another run: tensor 'a' is torch.float32 [6], expected torch.float64 [6]",
        "fewer": "kept: is of another run; names that do not match: b",
        "more": "kept: is of another run; names that do not match: c",
        "none": "nothing: holds no checkpoint (index.json is missing)",
        "cut short": "part-00001.safetensors: has ",
    }
    assert set(by_rank[0]) == set(wanted)
    for what, mention in wanted.items():
        lines = {said[what][0] for said in by_rank}
        assert len(lines) == 1 and mention in (line := lines.pop()) and "\n" not in line, (what, by_rank)
        assert [said[what][1] for said in by_rank] == [False, True], what


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A checkpoint of one rank with something of each kind."""
    path = tmp_path / "checkpoint"
    save_sharded(path, keeping.values(3), ALONE, {"ledger_head": "ab" * 32})
    return path


def part_of(path: Path) -> Path:
    (found,) = path.rglob("*.safetensors")
    return found


def refuses(path: Path, mention: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_sharded(path, None, ALONE)
    line = str(caught.value)
    assert mention in line and "\n" not in line and len(line) < 400, line
    return line


def test_files_are_those_of_the_format(kept):
    """Other programs read them, and what a checkpoint holds is known from its index."""
    found, index = load_file(part_of(kept)), read_index(kept)
    assert set(found) == set(index.tensors) == set(keeping.values(3))
    for name, value in keeping.values(3).items():
        assert keeping.bits(found[name]) == keeping.bits(value)
        assert (index.tensors[name].dtype, index.tensors[name].shape) == (value.dtype, tuple(value.shape))
    assert index.total_size == part_of(kept).stat().st_size
    assert index.info == {"ledger_head": "ab" * 32}


def test_a_file_of_tensors_that_was_changed_is_refused(kept):
    part = part_of(kept)
    whole = part.read_bytes()
    for size in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:size])
        refuses(kept, f"{part}: has {size} bytes, not the {len(whole)} that were written")
    part.write_bytes(whole + b"\0")
    refuses(kept, f"{part}: has {len(whole) + 1} bytes")
    for at in range(0, len(whole), 1 + len(whole) // 50):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        refuses(kept, f"{part}: is damaged (its checksum does not fit)")
    part.unlink()
    refuses(kept, f"{part}: is missing")
    part.mkdir()
    refuses(kept, f"{part}: can not be read")


def test_an_index_that_was_changed_is_refused(kept):
    index = kept / "index.json"
    whole = index.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        index.write_bytes(whole[:size])
        refuses(kept, f"{index}: is damaged")
    for at in range(0, len(whole), 1 + len(whole) // 200):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refuses(kept, str(index))
    index.write_bytes(b"[" * 100_000)
    refuses(kept, f"{index}: is damaged")
    index.write_bytes(b'{"weight_map": {}, "metadata": {"total_size": 1}}')
    refuses(kept, f"{index}: is not the index of a checkpoint")
    index.unlink()
    refuses(kept, f"{kept}: holds no checkpoint")


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index and make its checksum fit again."""
    whole = json.loads((path / "index.json").read_text())
    change(whole["checkpoint"])
    text = json.dumps(whole["checkpoint"], sort_keys=True, separators=(",", ":"))
    whole["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "index.json").write_text(json.dumps(whole))


NAME = "rows.network.F32.weight"
FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file elsewhere": lambda c: c["files"].update({"../else.safetensors": next(iter(c["files"].values()))}),
    "a tensor in a file elsewhere": lambda c: c["tensors"][NAME]["chunks"][0].__setitem__(0, "/etc/passwd"),
    "a type that is none": lambda c: c["tensors"][NAME].update(dtype="F99"),
    "a shape that is larger": lambda c: c["tensors"][NAME]["shape"].__setitem__(0, 10**12),
    "all of it larger": lambda c: (
        c["tensors"][NAME]["shape"].__setitem__(0, 10**12),
        c["tensors"][NAME]["chunks"][0][2].__setitem__(0, 10**12),
    ),
    "a size below zero": lambda c: c["tensors"][NAME]["shape"].__setitem__(0, -1),
    "a size that is text": lambda c: c["tensors"][NAME]["shape"].__setitem__(0, "1"),
    "no parts": lambda c: c["tensors"][NAME].update(chunks=[]),
    "a part twice": lambda c: c["tensors"][NAME]["chunks"].append(c["tensors"][NAME]["chunks"][0]),
    "a part that begins later": lambda c: c["tensors"][NAME]["chunks"][0][1].__setitem__(0, 1),
    "another total": lambda c: c.update(total_size=1),
    "no files": lambda c: c.pop("files"),
    "files that are a list": lambda c: c.update(files=[]),
    "a checksum that is none": lambda c: next(iter(c["files"].values())).update(sha256="0"),
    "information that is text": lambda c: c.update(info="x"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_an_index_that_contradicts_itself_is_refused(kept, what):
    forged(kept, FORGERIES[what])
    refuses(kept, f"{kept / 'index.json'}: contradicts itself (")


def test_tensors_that_are_not_those_of_the_index_are_refused(kept):
    """Whoever forges files and index together gets one line as well."""

    def retype(body: dict[str, Any]) -> None:
        body["tensors"][NAME]["dtype"] = "I32"

    forged(kept, retype)
    refuses(kept, f"{part_of(kept)}: tensor {NAME!r} is not the one of the index")
    part_of(kept).write_bytes(b"\xff" * 100)

    def rewrite(body: dict[str, Any]) -> None:
        (name,) = body["files"]
        body["files"][name] = {"size": 100, "sha256": hashlib.sha256(b"\xff" * 100).hexdigest()}
        body["tensors"] = {"a": {"dtype": "F32", "shape": [2], "chunks": [[name, [0], [2]]]}}
        body["total_size"] = 100

    forged(kept, rewrite)
    refuses(kept, f"{part_of(kept)}: can not be read")


def test_another_version_of_the_format_is_refused(kept):
    whole = json.loads((kept / "index.json").read_text())
    whole["version"] = 2
    (kept / "index.json").write_text(json.dumps(whole))
    refuses(kept, "index.json: was written in version 2 of the format, this program reads 1")


def test_reading_runs_no_code(kept, monkeypatch):
    """What torch's own reader would unpickle is not looked at; nothing is unpickled in one process."""

    def unpickled(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    (kept / ".metadata").write_bytes(b"cos\nabort\n(tR.")
    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, unpickled)
    assert set(load_sharded(kept, None, ALONE)) == set(keeping.values(3))


def test_what_a_kill_left_goes_and_what_is_not_ours_stays(kept):
    left, strange = kept / "data-0123456789abcdef", kept / "data-mine"
    for folder in (left, strange):
        folder.mkdir()
        (folder / "part-00000.safetensors").write_bytes(b"half")
    (kept / "index.json.part").write_bytes(b"{")
    before = part_of_index(kept)
    assert set(load_sharded(kept, None, ALONE)) == set(keeping.values(3))
    save_sharded(kept, {"a": torch.ones(2)}, ALONE)
    assert sorted(p.name for p in kept.iterdir()) == sorted([part_of_index(kept), "data-mine", "index.json"])
    assert part_of_index(kept) != before
    remove_sharded(kept)
    assert [p.name for p in kept.iterdir()] == ["data-mine"] and not is_saved(kept)
    (strange / "part-00000.safetensors").unlink()
    strange.rmdir()
    remove_sharded(kept)
    remove_sharded(kept)
    assert not kept.exists()


def part_of_index(path: Path) -> str:
    (name,) = read_index(path).files
    return name.split("/")[0]


def test_an_index_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not the index of a checkpoint"):
        save_sharded(tmp_path, {"a": torch.ones(2)}, ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: can not be written"):
        save_sharded(tmp_path / "file", {"a": torch.ones(2)}, ALONE)


def test_views_of_one_memory_are_kept_by_value(tmp_path):
    memory = torch.arange(12.0)
    tensors = {
        "a": memory[:6],
        "b": memory[3:].view(3, 3).t(),
        "c": torch.nn.Parameter(memory[::2]),
        "d": memory[1].expand(4),
    }
    save_sharded(tmp_path / "c", tensors, ALONE)
    found = load_sharded(tmp_path / "c", tensors, ALONE)
    for name, value in tensors.items():
        assert torch.equal(found[name], value.detach()) and not found[name].requires_grad
        assert found[name].untyped_storage().data_ptr() != memory.untyped_storage().data_ptr()


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path):
    script = Path(__file__).with_name("kill_saves.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), str(KILLS), "7"],
        **{"capture_output": True, "text": True, "timeout": 300, "check": False},
        env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] == KILLS
    # Kills before and after the replacement of the index. Gloo does not see at once of every peer that it is gone.
    assert seen["old"] and seen["new"] and seen["leftovers"] and seen["lost"] > KILLS / 2, seen
