"""A record's fields: a null is an absent field, a number is its text, and what is read is known."""

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from loram_cli.training.data.json_text import kind_of
from loram_cli.training.data.records import Record
from loram_cli.training.data.tally import Tally, UnusableRecord

_MOST_NAMES = 12


def is_absent(value: Any) -> bool:
    """Whether a value is none: null, or the not-a-number by which tables write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_nulls(value: Any) -> Any:
    """A value of lists and objects, from which null fields are taken at every level."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


class Fields:
    """The fields of one record that are not null.

    Attributes:
        values: The fields, for a look at them: what is only looked at counts as not used.
        where: File and line.
        tally: Counts what is changed or not used.
    """

    def __init__(self, record: Record, tally: Tally) -> None:
        self.where, self.tally = record.where, tally
        self.values: Mapping[str, Any] = present(record.fields)
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def value(self, key: str) -> Any:
        """A field's value as it is; None where it is absent."""
        self._used.add(key)
        return self.values.get(key)

    def first_of(self, keys: Iterable[str]) -> str | None:
        """The first of some names that the record has."""
        return next((key for key in keys if key in self.values), None)

    def text(self, key: str) -> str:
        """A field's text; a number, true or false is turned to text and counted.

        Raises:
            UnusableRecord: It is a list, an object or bytes.
        """
        return as_text(self.value(key), f"field '{key}'", self.where, self.tally)

    def text_if_any(self, *keys: str) -> str:
        """The text of the first of some names; empty where there is none.

        Raises:
            UnusableRecord: As :meth:`text`.
        """
        key = self.first_of(keys)
        return "" if key is None else self.text(key)

    def tell_unused(self) -> None:
        """Count the fields that were not read."""
        for key in self.values:
            if key not in self._used:
                self.tally.leave_unused(f"'{key}'", self.where)


def names_of(fields: Iterable[Any]) -> str:
    """The names of a record's fields, for errors: the first dozen."""
    names = [str(name) for name in fields]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"(fields: {', '.join(names[:_MOST_NAMES]) or 'none'}{more})"


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null; a name in capitals is the same in small letters."""
    found = {str(key): value for key, value in fields.items() if not is_absent(value)}
    small = {key.lower(): value for key, value in found.items()}
    return small if len(small) == len(found) else found


def as_text(value: Any, what: str, where: str, tally: Tally) -> str:
    """A value that must be text, as text.

    Raises:
        UnusableRecord: It is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | Decimal):
        tally.change(f"{what} is no text and was read as text", where)
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise UnusableRecord(where, f"{what} must be text, not {_kind(value)}")


def _kind(value: Any) -> str:
    return kind_of(value) if isinstance(value, dict | list) or value is None else "bytes or a date"
