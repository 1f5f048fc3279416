"""What shared graphs know of the nodes: names, and inputs and outputs by place. It is kept in node_schemas.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KNOWN: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())


def summary(schemas: Iterable[Any]) -> dict[str, Any]:
    """The same of nodes' V3 schemas."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "inputs": [
                [given.id, given.io_type, getattr(given, "default", None), bool(given.optional)]
                for given in schema.inputs
            ],
            "outputs": [given.io_type for given in schema.outputs],
        }
        for schema in schemas
    }
