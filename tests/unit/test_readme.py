"""The README's example runs as it is printed."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_example_runs(tmp_path, monkeypatch):
    text = README.read_text()
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    for _ in range(5):  # as often as a reader tries it: it leaves room for the next time
        names: dict[str, object] = {}
        exec(compile(example[1], str(README), "exec"), names)  # noqa: S102  it is our own README
    assert names["keys"].shape == (256, 8, 128)
    assert names["k"].shape == names["v"].shape == (1, 1, 8, 128)
    assert (names["k"] == 1).all()
