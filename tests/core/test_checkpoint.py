import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
trees = st.recursive(
    leaves,
    lambda node: (
        st.lists(node, max_size=3)
        | st.tuples(node, node)
        | st.dictionaries(st.text(max_size=3) | st.integers(), node, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(tree=trees)
def test_plain_trees_come_back_equal(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "tree.safetensors"
    save_tree(path, tree)
    assert load_tree(path) == tree


def test_an_optimizer_state_comes_back_to_the_bit(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    save_tree(tmp_path / "a", optimizer.state_dict())
    loaded = load_tree(tmp_path / "a")
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(loaded["state"][key][name], value)
    torch.optim.AdamW(model.parameters()).load_state_dict(loaded)


def test_shared_storage_nan_and_infinity_survive(tmp_path):
    x = torch.randn(4)
    save_tree(
        tmp_path / "a", {"x": x, "view": x[1:], "nan": math.nan, "inf": -math.inf, "empty": torch.empty(0)}
    )
    loaded = load_tree(tmp_path / "a")
    assert torch.equal(loaded["view"], x[1:])
    assert math.isnan(loaded["nan"])
    assert loaded["inf"] == -math.inf


def test_what_cannot_be_stored_is_named_and_leaves_the_old_file(tmp_path):
    save_tree(tmp_path / "a", 1)
    with pytest.raises(TypeError, match=r"set at \['outer'\]\[1\]"):
        save_tree(tmp_path / "a", {"outer": [0, {1, 2}]})
    assert load_tree(tmp_path / "a") == 1


def test_a_cut_or_foreign_file_is_an_error(tmp_path):
    save_tree(tmp_path / "a", {"x": torch.randn(100)})
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:200])
    for name in ("cut", "missing"):
        with pytest.raises(DataError, match="not a checkpoint"):
            load_tree(tmp_path / name)
