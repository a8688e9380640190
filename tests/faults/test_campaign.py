"""The campaign in small, with another seed than the large one's: `python -m tests.faults` for that."""

import pytest

from tests.faults.campaign import Row, campaign, table


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_few_faults_of_every_kind_lose_nothing(tmp_path):
    rows = campaign(tries=6, seed=17, folder=tmp_path, report=lambda row: None)
    assert {row.fault for row in rows} == {"SIGKILL", "SIGTERM", "full disk", "torn file", "flipped bit"}
    for row in rows:
        assert row.survived == row.tries > 0, row
        assert row.equal == row.ends > 0, row
    assert sum(row.hit for row in rows) > len(rows) // 2


def test_the_table_adds_up():
    rows = [Row("training", "SIGKILL", 3, 2, 3, 1, 1), Row("fid", "full disk", 1, 1, 0, 1, 0)]
    assert table(rows).splitlines()[-1] == "| **all** | | 4 | 3 | 3 | 2 | 1 |"
