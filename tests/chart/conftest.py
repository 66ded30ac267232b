import pytest

import tools
from examples import Helm


@pytest.fixture(scope="session", params=["helm3", "helm4"])
def helm(request):
    """Each Helm that is supported."""
    return Helm(tools.helm(request.param))


@pytest.fixture(scope="session")
def helm4():
    """One Helm, where the version makes no difference."""
    return Helm(tools.helm("helm4"))
