import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# what an example trains under, named like the extra that installs it
CLIENTS = {
    "accelerate_loop.py": "accelerate",
    "huggingface_trainer.py": "transformers",
    "lightning_trainer.py": "lightning",
    "skorch_net.py": "skorch",
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(example, tmp_path, monkeypatch):
    client = CLIENTS.get(example)
    if client:
        pytest.importorskip(client, reason=f"needs the extra steppe[{client}]")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


def test_the_page_of_optimizers_is_what_the_registry_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
