"""The stored runs and pages that the report's tests share."""

from tests.report.conftest import log, page, quick, run, sketched  # noqa: F401
