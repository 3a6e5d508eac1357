"""Event files: what TensorBoard reads from them, after a kill and on a full disk, too."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synthward.engine.errors import ConfigError, PrivacyError
from synthward.observe import check_tensorboard
from synthward.observe.events import Checkpointed, Progress
from synthward.observe.scalars import TAGS, NullScalars, Scalars
from tests.observe.lines import PROGRESS


def unexpected(text: str) -> None:
    raise AssertionError(text)


def read(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar; nothing else may be there."""
    found = EventAccumulator(str(folder))
    found.Reload()
    kinds = found.Tags()
    assert {name for name, tags in kinds.items() if tags} <= {"scalars"}
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in kinds["scalars"]}


def points(*steps: int, **fields) -> list[Progress]:
    return [Progress(**(PROGRESS | {"step": step} | fields)) for step in steps]


def written(folder, lines, step=0) -> None:
    scalars = Scalars(folder, step, unexpected)
    for line in lines:
        scalars.write(line)
    scalars.close()
    scalars.close()


def test_the_scalars_are_those_of_the_progress_lines(tmp_path):
    written(tmp_path / "new" / "folder", points(50, 100, clip_bound=0.25))
    found = read(tmp_path / "new" / "folder")
    assert set(found) == set(TAGS.values())
    for field, tag in TAGS.items():
        value = 0.25 if field == "clip_bound" else PROGRESS[field]
        assert found[tag] == [(50, pytest.approx(value)), (100, pytest.approx(value))]
    [file] = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("events.out.tfevents.")


def test_what_is_not_known_has_no_point(tmp_path):
    written(tmp_path, points(50, steps_per_second=None, update_norm=None))
    assert set(read(tmp_path)) == {
        "privacy/epsilon",
        "training/learning_rate",
        "training/parameter_norm",
    }


def test_steps_that_a_kill_took_are_not_shown(tmp_path):
    written(tmp_path, points(50, 100, 150))
    written(tmp_path, points(150, 200, epsilon=0.5), step=100)
    assert read(tmp_path)["privacy/epsilon"] == [(50, 0.75), (100, 0.75), (150, 0.5), (200, 0.5)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("make", [NullScalars, lambda: Scalars.__new__(Scalars)])
def test_other_lines_have_no_scalars(make):
    class Leaky(Progress):
        loss: float

    for line in (Checkpointed(step=1), Leaky(**PROGRESS, loss=0.5)):
        with pytest.raises(PrivacyError, match=f"not of {type(line).__name__}"):
            make().write(line)


def test_a_folder_that_can_not_be_made_is_told_once(tmp_path):
    said: list[str] = []
    (tmp_path / "file").write_text("mine")
    scalars = Scalars(tmp_path / "file", 0, said.append)
    scalars.write(points(50)[0])
    scalars.close()
    assert len(said) == 1 and "goes on without TensorBoard" in said[0]


def test_a_full_disk_is_told_once(tmp_path, monkeypatch):
    said: list[str] = []
    scalars = Scalars(tmp_path, 0, said.append)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synthward.observe.scalars.write_all", full)
    for line in points(50, 100):
        scalars.write(line)
    scalars.close()
    assert len(said) == 1 and "No space left" in said[0]


def test_a_missing_package_is_one_line(no_tensorboard):
    with pytest.raises(ConfigError, match=r"pip install 'synthward\[tensorboard\]'"):
        check_tensorboard()


def test_an_installed_package_is_found():
    check_tensorboard()
