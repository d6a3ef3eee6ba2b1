"""Fill the templates of the pages, whose text is escaped, and write a page where it belongs."""

from pathlib import Path
from typing import Any

import jinja2

from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.report.comparison import plain


def render(template: str, **values: Any) -> str:
    """Return the page that a template of this folder makes of `values`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"decimal": decimal, "plain": plain}
    return environment.get_template(template).render(**values)


def decimal(value: float | None, digits: int = 1, scale: float = 1.0, sign: bool = False) -> str:
    """A number for a table cell: a real minus sign, thousands apart, a dash for none."""
    if value is None:
        return "–"
    return f"{scale * value:{'+' if sign else ''},.{digits}f}".replace("-", "−").replace(",", " ")


def write(page: str, out: Path) -> Path:
    """Write `page` to `out`, complete or not at all; UsageError where that cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UsageError(f"cannot write the report to {out}: {error.strerror}") from error
    return out
