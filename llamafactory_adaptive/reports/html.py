"""The templates of pages; every value that is put into one is escaped, unless a template says otherwise."""

from functools import cache
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from jinja2 import Environment


def rendered(template: str, **values: Any) -> str:
    """Fill a template of ``reports/templates`` with values."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("llamafactory_adaptive.reports", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
