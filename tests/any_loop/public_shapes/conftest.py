"""Lightning's Fabric is loaded as the integrations' tests load Lightning."""

import tests.integrations.conftest  # noqa: F401
