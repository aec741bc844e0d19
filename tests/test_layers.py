"""A module imports only from its own layer and those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "steppe"
MAY_IMPORT = {
    "core": set(),
    "optim": {"core"},
    "problems": {"core"},
    "landscape": {"core"},
    "integrations": {"core", "optim"},
    "quant": {"core", "problems"},
    "study": {"core", "optim", "problems", "landscape", "quant"},
    "report": {"core.errors", "core.files", "study.store", "study.statistics"},
    "testing": {"core", "optim", "problems"},
}


def imports(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layer_imports_only_what_it_may(layer):
    files = sorted((SOURCE / layer).rglob("*.py")) if (SOURCE / layer).is_dir() else [SOURCE / f"{layer}.py"]
    for path in files:
        for name in imports(path) if path.exists() else ():
            if not name.startswith("steppe."):
                continue
            inner = name.removeprefix("steppe.")
            allowed = MAY_IMPORT[layer] | {layer}
            assert any(inner == a or inner.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"


def test_no_pickle_anywhere():
    # the conformance suite alone pickles, in memory, to see that optimizers can be
    for path in set(SOURCE.rglob("*.py")) - set((SOURCE / "testing").rglob("*.py")):
        assert not {"pickle", "cloudpickle", "joblib", "shelve"} & set(imports(path)), path
        assert "torch.load(" not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    "module",
    ["steppe", "steppe.cli", "steppe.report", "steppe.optim.registry", "steppe.optim.federated.registry"],
)
def test_modules_that_stay_free_of_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module


def test_every_public_name_is_there():
    import steppe

    assert sorted(steppe.__all__) == sorted(steppe._HOME)
    for name in steppe.__all__:
        assert getattr(steppe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = steppe.nothing
