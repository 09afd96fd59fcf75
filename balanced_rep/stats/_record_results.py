"""What a `record` found: statistics by layer, over all forwards, by forward and by timestep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from balanced_rep.stats._record_layers import near_names
from balanced_rep.stats._record_time import Moment, read_all
from balanced_rep.stats._representation import RepresentationStats, cat

__all__ = ["Key", "Recording"]

Key = str | tuple[str, int]
_FOLD_AFTER = 32  # forwards whose statistics of units wait to be merged in one go


class _Entry(NamedTuple):
    """What one forward gave for one key."""

    moment: Moment
    stats: RepresentationStats


class Recording(Mapping[Key, RepresentationStats]):
    """Statistics of the recorded layers, filled while the model runs and readable at any time.

    Keys are layer names in the order in which the model lists its modules, or ``(name, call)`` with ``call="all"``; a
    layer that has not run has no key. ``recording[key]`` holds the samples of all recorded forwards one after another,
    shape ``(samples,)``. With ``per="unit"`` it is one result per unit over all of them; forwards are merged as they
    come, apart for each of ``timesteps=``, so that a long stream takes no more memory than a short one.

    Attributes:
        layers: The names listened to.
        calls: How often each layer was called in each recorded forward; a stopped forward counts up to the stop.
    """

    def __init__(self, layers: Sequence[str], *, per: str, every_call: bool, wanted: tuple[float, ...] | None) -> None:
        self.layers = tuple(layers)
        self.calls: dict[str, list[int]] = {name: [] for name in layers}
        self._per = per
        self._every_call = every_call
        self._wanted = wanted
        self._moments: list[Moment] = []
        self._arrived: defaultdict[Key, list[_Entry]] = defaultdict(list)  # as committed
        self._entries: defaultdict[Key, list[_Entry]] = defaultdict(list)  # without unwanted timesteps
        self._merged: dict[Key, tuple[int, RepresentationStats]] = {}  # of so many entries

    # Reading ---------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> RepresentationStats:
        """Statistics over all recorded forwards."""
        entries = self._of(key)
        done, merged = self._merged.get(key, (0, None))
        if merged is None or done < len(entries):
            parts = [stats for _, stats in entries[done:]]
            merged = self._join(parts if merged is None else [merged, *parts])
            self._merged[key] = len(entries), merged
        return merged

    def __iter__(self) -> Iterator[Key]:
        self._settle()
        place = {name: i for i, name in enumerate(self.layers)}
        pairs = {key: (key, 0) if isinstance(key, str) else key for key in self._entries}
        return iter(sorted(pairs, key=lambda key: (place[pairs[key][0]], pairs[key][1])))

    def __len__(self) -> int:
        self._settle()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Recording({len(self.layers)} layers, {self.forwards} forwards, per={self._per!r})"

    @property
    def forwards(self) -> int:
        """Number of recorded forwards."""
        return len(self._moments)

    @property
    def timesteps(self) -> list[tuple[float, ...]]:
        """The timestep argument of each recorded forward: one value, one per sample, or ``()`` if none was found."""
        read_all(self._moments)
        return [moment.values for moment in self._moments]

    def per_forward(self, key: Key) -> list[RepresentationStats]:
        """The statistics of each recorded forward in which the layer ran.

        Args:
            key: A key of the recording.

        Returns:
            One entry per forward, oldest first.

        Raises:
            ValueError: With ``per="unit"``, which merges forwards.
        """
        if self._per == "unit":
            raise ValueError('record: per="unit" merges forwards; record per="sample", or make a record per forward')
        return [stats for _, stats in self._of(key)]

    def by_timestep(self, key: Key) -> dict[float, RepresentationStats]:
        """Splits the statistics by timestep; samples of one timestep are joined over forwards.

        Args:
            key: A key of the recording.

        Returns:
            Timestep to statistics, in the order of appearance. A timestep is the value of ``timesteps=`` that it
            matches, otherwise the shortest decimal that rounds to the number the model was given.
        """
        groups: defaultdict[float, list[RepresentationStats]] = defaultdict(list)
        for entry in self._of(key):
            values = self._row_timesteps(entry)
            for value in dict.fromkeys(values):
                groups[value].append(self._rows(entry.stats, [v == value for v in values]))
        return {value: self._join(parts) for value, parts in groups.items()}

    def to(self, device: torch.device | str) -> Recording:
        """Moves everything recorded so far, in one transfer per device it is on.

        Args:
            device: Where to.

        Returns:
            This recording.
        """
        self._settle()
        by_device: defaultdict[torch.device, list[tuple[Key, int]]] = defaultdict(list)
        for key, entries in self._entries.items():
            for i, entry in enumerate(entries):
                by_device[entry.stats.state.device].append((key, i))
        for places in by_device.values():
            entries = [self._entries[key][i] for key, i in places]
            moved = torch.cat([e.stats.state.flatten(1) for e in entries], dim=1).to(device)
            parts = moved.split([e.stats.shape.numel() for e in entries], dim=1)
            for (key, i), (moment, stats), part in zip(places, entries, parts, strict=True):
                moved_stats = replace(stats, state=part.reshape(stats.state.shape)).to(device)  # extras one by one
                self._entries[key][i] = _Entry(moment, moved_stats)
        self._merged.clear()
        return self

    def cpu(self) -> Recording:
        """Moves everything recorded so far to host memory, in one transfer per device."""
        return self.to("cpu")

    # Filling ---------------------------------------------------------------------------------------------------------

    def commit(self, moment: Moment, stats: Mapping[Key, RepresentationStats], calls: Mapping[str, int]) -> None:
        """Adds a forward that has ended; called by the hooks.

        Args:
            moment: Its timestep.
            stats: What it gave.
            calls: How often each layer ran.
        """
        self._moments.append(moment)
        for name in self.layers:
            self.calls[name].append(calls.get(name, 0))
        for key, value in stats.items():
            self._arrived[key].append(_Entry(moment, value))
        if self._per == "unit" and not (self._wanted is not None and moment.deferred):
            if any(len(self._arrived[key]) >= _FOLD_AFTER for key in stats):
                self._settle()

    def _settle(self) -> None:
        """Takes in what has arrived, dropping samples at unwanted timesteps.

        Timesteps in host memory were looked at before the forward; those on an accelerator are read here, in one go.
        """
        if self._wanted is not None:
            read_all(entry.moment for entries in self._arrived.values() for entry in entries)
        settled = {
            key: [part for entry in entries if (part := self._wanted_part(entry)) is not None]
            for key, entries in self._arrived.items()
        }
        self._arrived.clear()
        for key, entries in settled.items():
            if entries and self._per == "unit":
                self._fold(key, entries)
            elif entries:
                self._entries[key] += entries

    def _fold(self, key: Key, entries: list[_Entry]) -> None:
        """Merges statistics of units, timestep by timestep."""
        groups: defaultdict[tuple[float, ...], list[RepresentationStats]] = defaultdict(list)
        for moment, stats in [*self._entries[key], *entries]:
            groups[() if self._wanted is None else moment.values].append(stats)
        self._entries[key] = [_Entry(Moment(values), self._join(parts)) for values, parts in groups.items()]
        self._merged.pop(key, None)

    def _wanted_part(self, entry: _Entry) -> _Entry | None:
        if self._wanted is None:
            return entry
        matches = [entry.moment.match(value, self._wanted) for value in self._row_timesteps(entry)]
        kept = tuple(m for m in matches if m is not None)
        if not kept and matches:
            return None
        return _Entry(Moment(kept) if kept else entry.moment, self._rows(entry.stats, [m is not None for m in matches]))

    def _row_timesteps(self, entry: _Entry) -> tuple[float, ...]:
        """One timestep per sample; a single one for statistics per unit, where samples are no longer apart."""
        if self._per == "sample":
            return entry.moment.per_row(len(entry.stats))
        if self._wanted is None:
            raise ValueError('record: per="unit" merges forwards; say timesteps= to keep some timesteps apart')
        values = entry.moment.per_row(len(entry.moment.values))
        if len(set(values)) > 1:
            raise ValueError(
                'record: the samples of a forward have different timesteps, and per="unit" has merged them; call the '
                'model once per timestep, or record per="sample"'
            )
        return values[:1]

    def _rows(self, stats: RepresentationStats, keep: list[bool]) -> RepresentationStats:
        if all(keep):
            return stats
        rows = torch.tensor([i for i, wanted in enumerate(keep) if wanted], device=stats.state.device)
        return stats[rows]

    # Inside ----------------------------------------------------------------------------------------------------------

    def _of(self, key: Key) -> list[_Entry]:
        self._settle()
        if key in self._entries:
            return self._entries[key]
        raise KeyError(self._why_absent(key))

    def _join(self, parts: list[RepresentationStats]) -> RepresentationStats:
        if self._per == "sample":
            return cat(parts)
        return parts[0].merge(*parts[1:])

    def _why_absent(self, key: Key) -> str:
        name = key[0] if isinstance(key, tuple) and key else key
        if name not in self.calls:
            near = near_names(str(name), self.layers)
            return f"{name!r} is not recorded; recorded are {', '.join(map(repr, near or self.layers[:6]))}"
        if not self._moments:
            return f"{name!r}: no forward has been recorded yet"
        if not sum(self.calls[name]):
            return f"{name!r} ran zero times in {self.forwards} recorded forwards"
        if self._every_call and isinstance(key, str):
            return f'{name!r}: with call="all" keys are (name, call), here ({name!r}, 0 to {max(self.calls[name]) - 1})'
        if isinstance(key, tuple):
            limit = f"it was called {max(self.calls[name])} times at most" if self._every_call else 'call is not "all"'
            return f"{key!r}: {limit}"
        seen = sorted({value for moment in self._moments for value in moment.values})
        return f"{name!r}: no sample at timesteps {self._wanted}; seen: {seen[:12]}"
