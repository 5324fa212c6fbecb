"""The chart, rendered with the values that a test gives: `render(services={"training": {"replicas": 2}})`."""

from __future__ import annotations

import json
from functools import cache

import pytest
from chart_render import CASES, parse, render

from tests.chart.objects import Objects, Render


@pytest.fixture(scope="session", name="render")
def render_objects() -> Render:
    """Renders, once for each set of values."""

    @cache
    def cached(case: str, values: str) -> str:
        return render([CASES[case]], json.loads(values))

    return lambda case="default", **values: Objects(parse(cached(case, json.dumps(values))))
