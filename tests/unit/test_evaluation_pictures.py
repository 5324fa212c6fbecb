"""Whether an answer shows the pictures of a result, worked out by hand."""

from __future__ import annotations

import pytest

from services.evaluation.metrics import pictures_shown

ONE, TWO = "https://a.cn/1.png", "https://a.cn/2.jpg?size=large"


@pytest.mark.parametrize(
    ("observation", "answer", "shown"),
    [
        (f"{{'url': '{ONE}'}}", f"画好了：![图片]({ONE})", True),
        (f"{{'url': '{ONE}'}}", f"Here: ![Image]({ONE}).", True),
        (f"![IMAGEGEN]({ONE})", f"![any words]({ONE})", True),
        (f"{ONE} {TWO}", f"![图片]({ONE})\n![图片]({TWO})", True),
        (f"{ONE} {TWO}", f"![图片]({ONE})", False),
        (ONE, f"It is at {ONE}.", False),
        (ONE, f"It is [here]({ONE}).", False),
        (ONE, "![Image](https://a.cn/other.png)", False),
        (TWO, "![Image](https://a.cn/2.jpg)", False),
        (ONE, "", False),
        ("no picture", f"![Image]({ONE})", None),
        ("https://a.cn/page.html", "https://a.cn/page.html", None),
    ],
)
def test_pictures_shown(observation: str, answer: str, shown: bool | None) -> None:
    assert pictures_shown(observation, answer) is shown
