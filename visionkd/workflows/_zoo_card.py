"""The text of a zoo card: YAML in the order of the schema, short values in one line, prose a line each."""

from __future__ import annotations

from typing import Any

import yaml

from visionkd.hub.card import Card

#: Lists that hold sentences or records, which are read more easily below each other.
_BLOCKS = frozenset({"good_for", "bad_for", "notes", "metrics", "latencies", "files", "sources"})


class _Block(list):
    """A list that is written with a line for each element."""


class _BlockMap(dict):
    """A mapping that is written with a line for each key."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # elements are indented below their key


_Dumper.add_representer(
    _Block, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=False)
)


_Dumper.add_representer(
    _BlockMap, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=False)
)


def card_text(card: Card) -> str:
    """Return the file of a card; what is at its default is left out."""
    values = _blocks(card.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def _blocks(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        values = {name: _blocks(item, name) for name, item in value.items()}
        return _BlockMap(values) if key == "training" and len(values) > 1 else values
    if isinstance(value, list):
        items = [_blocks(item) for item in value]
        return _Block(items) if key in _BLOCKS else items
    return value
