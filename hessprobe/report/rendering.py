"""Templates of pages as they are filled in: everything escaped, a name that is not there an error."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment_of(package: str) -> Environment:
    """Returns the templates in a package's own folder `templates`."""
    return Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(name: str) -> Markup:
    """Returns a file of the report's templates as it stands (our own style and script, no user's text)."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))
