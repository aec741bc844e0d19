"""Trees of tensors and plain values in one safetensors file: checkpoints that cannot execute code.

Tensors are stored as tensors; everything else (the tree's shape, numbers, strings, None) is JSON in the file's
metadata. Floats survive bit for bit (JSON writes the shortest text that reads back the same), NaN and infinities
included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steppe.core.errors import DataError
from steppe.core.files import write_atomically

__all__ = ["load_tree", "save_tree"]

_KEY = "steppe.tree"


def save_tree(path: str | Path, tree: Any) -> None:
    """Write ``tree`` (dicts, lists, tuples, tensors, numbers, strings, bools, None) atomically to ``path``.

    Dict keys may be strings or integers. Tensors are copied to the CPU; shared storage is written once per tensor.

    Raises:
        TypeError: the tree holds something else, named with its place.
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(node: Any, place: str) -> Any:
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            # clone: safetensors refuses tensors that share storage, a wrapper's state may
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"t": name}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, dict):
            return {"d": [[key, pack(value, f"{place}[{key!r}]")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            items = [pack(value, f"{place}[{i}]") for i, value in enumerate(node)]
            return {"l" if isinstance(node, list) else "u": items}
        raise TypeError(f"cannot store {type(node).__name__} at {place or 'the top'}.")

    skeleton = json.dumps(pack(tree, ""))
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata={_KEY: skeleton}))


def load_tree(path: str | Path) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU.

    Raises:
        DataError: the file is missing, cut short or was not written by `save_tree`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not a checkpoint of this library: {error}.") from error

    def unpack(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, value),) = node.items()
        if kind == "t":
            return tensors[value]
        if kind == "d":
            return {key: unpack(item) for key, item in value}
        items = [unpack(item) for item in value]
        return items if kind == "l" else tuple(items)

    return unpack(skeleton)
