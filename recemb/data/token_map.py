"""Look up ids of tokens in the sorted map files of a vocabulary, in bounded memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from recemb.data.layout import OOV_ID
from recemb.data.token_counts import Tokens
from recemb.data.vocabulary import FeatureVocabulary, id_dtype

# Below this many entries a map stays in the processor's cache, and sorting the queries costs more than it
# saves.
_CACHED_ENTRIES: Final = 1 << 15


class TokenMap:
    """Token -> id of one feature by binary search in two flat files: tokens rising, and their ids.

    A map is either resident (read into memory) or paged: then it is memory-mapped, at most ``page_entries``
    entries are touched at a time, and their pages are handed back after each look-up. Criteo 1TB has features
    with more than 100 M tokens; the page cache still serves the hot ones, but the process stays small.

    Args:
        vocabulary: what :func:`recemb.data.vocabulary.write_vocabulary` returned.
        map_path: prefix of its map files.
        page_entries: None for a resident map.
    """

    def __init__(self, vocabulary: FeatureVocabulary, map_path: Path, page_entries: int | None) -> None:
        self._missing_id = vocabulary.missing_id
        self._page_entries = page_entries
        self._maps: list[mmap.mmap] = []
        dtype = id_dtype(vocabulary.num_embeddings)
        if page_entries is None or vocabulary.map_entries == 0:
            self._tokens = np.fromfile(f"{map_path}.tokens", "<u4")
            self._ids = np.fromfile(f"{map_path}.ids", dtype)
        else:
            self._tokens = np.frombuffer(self._map_file(f"{map_path}.tokens"), "<u4")
            self._ids = np.frombuffer(self._map_file(f"{map_path}.ids"), dtype)

    def _map_file(self, path: str) -> mmap.mmap:
        with open(path, "rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        return mapped

    def lookup(self, tokens: Tokens, missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """int64 ids of ``tokens`` uint32 [n]: the empty field's where ``missing``, OOV_ID if unknown."""
        if self._tokens.size <= _CACHED_ENTRIES:
            ids = self._search(tokens, 0, self._tokens.size)
        else:
            # neighbours in the queries are neighbours in the map: several times fewer cache misses
            order = np.argsort(tokens)
            ids = np.empty(tokens.size, np.int64)
            ids[order] = self._lookup_sorted(tokens[order])
        ids[missing] = self._missing_id
        return ids

    def _lookup_sorted(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        if not self._maps or self._page_entries is None:
            return self._search(tokens, 0, self._tokens.size)
        ids = np.empty(tokens.size, np.int64)
        done = 0
        for start in range(0, self._tokens.size, self._page_entries):
            end = min(start + self._page_entries, self._tokens.size)
            last = end == self._tokens.size
            stop = tokens.size if last else int(np.searchsorted(tokens, self._tokens[end]))
            if stop > done:
                ids[done:stop] = self._search(tokens[done:stop], start, end)
                for mapped in self._maps:
                    mapped.madvise(mmap.MADV_DONTNEED)
            done = stop
        return ids

    def _search(self, tokens: Tokens, start: int, end: int) -> npt.NDArray[np.int64]:
        known, known_ids = self._tokens[start:end], self._ids[start:end]
        if known.size == 0:
            return np.full(tokens.size, OOV_ID, np.int64)
        position = np.minimum(np.searchsorted(known, tokens), known.size - 1)
        return np.where(known[position] == tokens, known_ids[position], OOV_ID).astype(np.int64, copy=False)


def open_maps(
    vocabularies: Sequence[FeatureVocabulary], map_paths: Sequence[Path], memory: int
) -> list[TokenMap]:
    """A map per feature within ``memory`` bytes: the small ones resident, the others paged.

    Paged maps share one window of a quarter of ``memory``.
    """
    sizes = [
        vocabulary.map_entries * (4 + id_dtype(vocabulary.num_embeddings).itemsize)
        for vocabulary in vocabularies
    ]
    resident: set[int] = set()
    used = 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        used += sizes[index]
        if used <= memory * 3 // 4:
            resident.add(index)
    page_entries = max(memory // 4 // 12, 1)
    return [
        TokenMap(vocabulary, path, None if index in resident else page_entries)
        for index, (vocabulary, path) in enumerate(zip(vocabularies, map_paths, strict=True))
    ]
