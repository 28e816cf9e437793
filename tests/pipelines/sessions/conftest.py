"""Pipelines that tests share: none may change one."""

from functools import cache

import pytest
from sessions_world import Pipelines, build


@pytest.fixture(scope="session")
def pipelines() -> Pipelines:
    return cache(build)
