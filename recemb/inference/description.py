"""Tables as text, which an exported program carries: what they are and how each is stored, without weights.

JSON of table specs, read back into equal ones. ``FORMAT`` counts its versions: a program that was exported
under another one is refused rather than misread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recemb import spec
from recemb.errors import ConfigError
from recemb.spec import Compression, HotRows, TableSpec
from recemb_kernels.storage import StoredAs

FORMAT = 1


@dataclass(frozen=True)
class Description:
    """The tables of one call of an exported program.

    Attributes:
        tables: those that are looked up, in order.
        kinds: by table how it is stored, for quantised tables; none for float ones.
        keys: the features of the batch, in its order.
        checked: feature, table and rows of every look-up whose ids are checked, of other calls too.
    """

    tables: tuple[TableSpec, ...]
    kinds: Mapping[str, StoredAs]
    keys: tuple[str, ...]
    checked: tuple[tuple[str, str, int], ...]

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "tables": [_of_table(table) for table in self.tables],
                "kinds": {name: kind.name for name, kind in self.kinds.items()},
                "keys": self.keys,
                "checked": self.checked,
            }
        )

    @staticmethod
    def from_text(text: str) -> Description:
        """The inverse of :meth:`to_text`.

        Raises:
            ConfigError: another version's text.
        """
        read = json.loads(text)
        if read.get("format") != FORMAT:
            raise ConfigError(
                f"the program was exported in format {read.get('format')} and this recemb reads format "
                f"{FORMAT}; export it again, or load it with the recemb that exported it"
            )
        return Description(
            tuple(_to_table(table) for table in read["tables"]),
            {name: StoredAs[kind] for name, kind in read["kinds"].items()},
            tuple(read["keys"]),
            tuple((feature, table, rows) for feature, table, rows in read["checked"]),
        )


def _of_table(table: TableSpec) -> dict[str, Any]:
    fields = asdict(table)
    fields["compression"]["type"] = type(table.compression).__name__
    return fields


def _to_table(fields: dict[str, Any]) -> TableSpec:
    settings = dict(fields["compression"])
    method = getattr(spec, settings.pop("type"))
    assert issubclass(method, Compression)
    cache = settings.pop("cache")
    compression = method(cache=None if cache is None else HotRows(**cache), **_tuples(settings))
    return TableSpec(**{**_tuples(fields), "compression": compression})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
