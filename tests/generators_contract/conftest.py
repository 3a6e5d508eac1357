"""One fitted run per generator on the tiny data, with a budget so wide that the cohort shows what was
learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commandline import fit_arguments, run
from tests.tinydata import table, write_tiny

PATIENTS, ROWS = 300, 600


@dataclass
class Fitted:
    """A finished run and the records that it was trained on."""

    generator: str
    run: Path
    real: list[dict[str, str]]

    def sample(self, out: Path, rows: int = 1000, **settings: Any) -> pa.Table:
        """A cohort, written to `out` and read back."""
        from synthward.run import sample_run

        sample_run(self.run, rows, out, **settings)
        return pq.read_table(out)


@pytest.fixture(scope="session", params=["diffusion", "gan"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp(request.param)
    data, schema = write_tiny(folder, PATIENTS, ROWS)
    arguments = fit_arguments(data, schema, folder / "run", generator=request.param, epsilon=50)
    arguments[arguments.index("--steps") + 1] = 300
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.stderr[-3000:]
    data.unlink()  # sampling must never need the records again
    return Fitted(request.param, folder / "run", table(PATIENTS, ROWS))


@pytest.fixture(scope="session")
def cohort(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Two thousand rows without a condition."""
    return fitted.sample(tmp_path_factory.mktemp("cohort") / "cohort.parquet", 2000, seed=1)
