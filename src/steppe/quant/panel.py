"""The market panel: dense, time-major, memory-mapped.

A panel holds everything known of a market by date and stock. It is time-major (``[dates, stocks, ...]``), so that
the 30-day windows of a date's whole cross-section are one slice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError

__all__ = ["FIELDS", "Panel", "Repair"]

FIELDS = ("open", "high", "low", "close", "vwap", "volume")
"""The six fields of `Panel.values`, in order."""

FORMAT = 2
_ARRAYS = (
    "values",
    "factor",
    "traded",
    "listed",
    "delisted",
    "age",
    "limit_up",
    "limit_down",
    "sealed_up",
    "sealed_down",
    "special",
    "industry",
    "float_cap",
)


@dataclass(frozen=True)
class Repair:
    """One rule that changed, dropped or only listed something of the input: how often, and the first places."""

    rule: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Panel:
    """A market by date and stock. T dates, N stocks.

    Attributes:
        name: what the panel is called in reports.
        simulated: True for made-up data; reports label every number with it.
        fingerprint: SHA-256 of the source data and of how it was read; part of a trial's identity.
        dates: ``[T]`` datetime64[D], strictly increasing trading sessions.
        symbols: ``[N]`` str.
        values: ``[T, N, 6]`` float32, the `FIELDS`; prices are multiplied by the back-adjustment factor known at
            the date, volume (shares) is divided by it. NaN where the stock did not trade.
        factor: ``[T, N]`` float32, the back-adjustment factor (adjusted price / price); NaN where not traded.
        traded: ``[T, N]`` bool, the stock has a bar at the date.
        listed: ``[T, N]`` bool, from the listing date to the delisting date of the source. Without these, from the
            first bar and without end: that a bar is the last one is not known at its date.
        delisted: ``[T, N]`` bool, from the first session after the last listed day that the source knows; all False
            where the source has no such days.
        age: ``[T, N]`` int32, calendar days since listing, or since the first bar where the source has no listing
            date; -1 before.
        limit_up: ``[T, N]`` bool, the open is at the upper price limit: it cannot be bought at the open.
        limit_down: ``[T, N]`` bool, the open is at the lower price limit: it cannot be sold at the open.
        sealed_up: ``[T, N]`` bool, the low is at the upper price limit: it cannot be bought all session.
        sealed_down: ``[T, N]`` bool, the high is at the lower price limit: it cannot be sold all session.
        special: ``[T, N]`` bool, special treatment (ST), carried through suspensions; all False where the source
            has no flag.
        industry: ``[T, N]`` int16, index into `industries`; -1 unknown.
        float_cap: ``[T, N]`` float32, free-float market value in currency units, with the last close during
            suspensions; NaN unknown.
        industries: names of the industries.
        members: index name -> ``[T, N]`` bool, point-in-time membership.
        weights: index name -> ``[T, N]`` float32, index weights at the close of the date where the source has them:
            sum 1 per date, all 0 before the first that are known.
        benchmarks: index name -> ``[T]`` float64, closing level of the price index (dividends are not in it); NaN
            unknown.
        repairs: what was repaired on the way in.
        notes: what a reader must know (what is missing, derived or approximate).
    """

    name: str
    simulated: bool
    fingerprint: str
    dates: NDArray[np.datetime64]
    symbols: NDArray[np.str_]
    values: NDArray[np.float32]
    factor: NDArray[np.float32]
    traded: NDArray[np.bool_]
    listed: NDArray[np.bool_]
    delisted: NDArray[np.bool_]
    age: NDArray[np.int32]
    limit_up: NDArray[np.bool_]
    limit_down: NDArray[np.bool_]
    sealed_up: NDArray[np.bool_]
    sealed_down: NDArray[np.bool_]
    special: NDArray[np.bool_]
    industry: NDArray[np.int16]
    float_cap: NDArray[np.float32]
    industries: tuple[str, ...] = ()
    members: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    benchmarks: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.dates), len(self.symbols))
        if 0 in shape:
            raise DataError(f"panel {self.name!r} is empty: {shape[0]} dates, {shape[1]} stocks.")
        if self.values.shape != (*shape, len(FIELDS)):
            raise DataError(
                f"panel {self.name!r}: values {self.values.shape}, expected {(*shape, len(FIELDS))}."
            )
        planes = {key: getattr(self, key) for key in _ARRAYS[1:]}
        planes |= {f"members[{k}]": v for k, v in self.members.items()}
        planes |= {f"weights[{k}]": v for k, v in self.weights.items()}
        for key, plane in planes.items():
            if plane.shape != shape:
                raise DataError(
                    f"panel {self.name!r}: {key} is {plane.shape}, expected {shape} [dates, stocks]."
                )
        for key, level in self.benchmarks.items():
            if level.shape != shape[:1]:
                raise DataError(
                    f"panel {self.name!r}: benchmarks[{key}] is {level.shape}, expected {shape[:1]} [dates]."
                )
        if np.any(np.diff(self.dates) <= np.timedelta64(0)):
            raise DataError(f"panel {self.name!r}: dates must be strictly increasing.")

    @property
    def shape(self) -> tuple[int, int]:
        """(dates, stocks)."""
        return len(self.dates), len(self.symbols)

    def rows(self, rows: ArrayLike) -> NDArray[np.intp]:
        """Evaluation dates as ``[D]`` checked indices into `dates`.

        Raises:
            DataError: they are none, no integers, not strictly increasing, or beyond the panel.
        """
        at = np.asarray(rows)
        if at.ndim != 1 or not len(at) or not np.issubdtype(at.dtype, np.integer):
            raise DataError("rows must be a non-empty list of integer indices into panel.dates.")
        if np.any(np.diff(at) <= 0) or at[0] < 0 or at[-1] >= len(self.dates):
            raise DataError(f"rows must increase strictly and lie within 0..{len(self.dates) - 1}.")
        return at.astype(np.intp)

    def field(self, name: str) -> NDArray[np.float32]:
        """One of the `FIELDS` as a ``[T, N]`` view."""
        return self.values[:, :, FIELDS.index(name)]

    def save(self, folder: str | Path) -> None:
        """Write the panel as ``.npy`` files and a manifest; the folder appears whole or not at all."""
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        arrays: dict[str, NDArray[Any]] = {key: getattr(self, key) for key in _ARRAYS}
        arrays |= {"dates": self.dates.astype("datetime64[D]").astype(np.int64), "symbols": self.symbols}
        arrays |= {f"members.{i}": plane for i, plane in enumerate(self.members.values())}
        arrays |= {f"weights.{i}": plane for i, plane in enumerate(self.weights.values())}
        arrays |= {f"benchmarks.{i}": level for i, level in enumerate(self.benchmarks.values())}
        manifest = {
            "format": FORMAT,
            "name": self.name,
            "simulated": self.simulated,
            "fingerprint": self.fingerprint,
            "industries": self.industries,
            "members": list(self.members),
            "weights": list(self.weights),
            "benchmarks": list(self.benchmarks),
            "repairs": [vars(repair) for repair in self.repairs],
            "notes": self.notes,
        }
        try:
            for key, array in arrays.items():
                np.save(partial / f"{key}.npy", array, allow_pickle=False)
            (partial / "manifest.json").write_text(
                json.dumps(manifest, ensure_ascii=False, indent=1), "utf-8"
            )
            shutil.rmtree(folder, ignore_errors=True)
            try:
                partial.rename(folder)
            except OSError:  # another process has put the folder there in between
                if not (folder / "manifest.json").is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path) -> Panel:
        """Open a saved panel read-only and memory-mapped: pages are read when they are touched.

        Raises:
            DataError: the folder is not a whole panel saved by this version's format.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{folder} is not a saved panel: {error}.") from error
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{folder} has panel format {manifest.get('format')}, this version reads {FORMAT}."
            )

        def array(key: str) -> NDArray[Any]:
            try:
                return np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{folder} is damaged: {key}.npy: {error}. Delete the folder.") from error

        return cls(
            name=manifest["name"],
            simulated=manifest["simulated"],
            fingerprint=manifest["fingerprint"],
            dates=np.asarray(array("dates")).astype("datetime64[D]"),
            symbols=np.asarray(array("symbols")),
            industries=tuple(manifest["industries"]),
            members={name: array(f"members.{i}") for i, name in enumerate(manifest["members"])},
            weights={name: array(f"weights.{i}") for i, name in enumerate(manifest["weights"])},
            benchmarks={name: array(f"benchmarks.{i}") for i, name in enumerate(manifest["benchmarks"])},
            repairs=tuple(
                Repair(repair["rule"], repair["count"], tuple(repair["examples"]))
                for repair in manifest["repairs"]
            ),
            notes=tuple(manifest["notes"]),
            **{key: array(key) for key in _ARRAYS},
        )
