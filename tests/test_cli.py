import subprocess
import sys

import pytest


def steppe(*arguments):
    code = "import sys; from steppe.cli import main; sys.argv = ['steppe', *sys.argv[1:]]; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_list_shows_every_optimizer_and_problem():
    from steppe.optim.registry import OPTIMIZERS
    from steppe.problems.registry import PROBLEMS

    shown = steppe("list")
    assert shown.returncode == 0
    for key in (*OPTIMIZERS, *PROBLEMS):
        assert key in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-study.toml"], "error: cannot read the study file"),
        (["report", "no-such-folder"], "error: there is no folder"),
        (["run", "--set", "epoch=3"], "Did you mean 'epochs'"),
        (["run", "--set", "problem.panel=no-such-folder"], "no-such-folder"),
    ],
)
def test_errors_are_one_message_without_a_traceback(arguments, message, tmp_path):
    done = steppe(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_data_check_prints_the_panel(tmp_path):
    lines = ["date,symbol,open,high,low,close,vwap,volume"]
    for day in range(4, 9):
        for symbol in ("A", "B"):
            lines.append(f"2016-01-{day:02d},{symbol},10,11,9,10.5,10.2,1000")
    (tmp_path / "bars.csv").write_text("\n".join(lines))
    done = steppe("data", "check", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2016-01-04" in done.stdout
