"""Templates of pages as they are filled in: everything escaped, a name that is not there an error."""

from __future__ import annotations

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup

from hessprobe import instruments


def environment_of(package: str) -> Environment:
    """Returns the templates in a package's own folder `templates`, and those of instruments by folder and name."""
    return Environment(
        loader=ChoiceLoader(
            [PackageLoader(package, "templates"), FileSystemLoader(Path(instruments.__path__[0]))]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(name: str) -> Markup:
    """Returns a file of the report's templates as it stands (our own style and script, no user's text)."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))
