"""One real server for all who ask what it shows."""

import pytest

from deployment.names import Exposition, scraped


@pytest.fixture(scope="session")
def server() -> Exposition:
    return scraped()
