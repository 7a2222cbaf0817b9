"""Write the JSON schema of what commands print with --json into docs/."""

import json
from pathlib import Path

from hyperlens.cli.schema import json_schema
from hyperlens.files import write_text

FILE = Path(__file__).resolve().parent.parent / "docs" / "hyperlens.schema.json"


def main() -> None:
    """Write the file."""
    write_text(FILE, json.dumps(json_schema(), indent=1) + "\n")


if __name__ == "__main__":
    main()
