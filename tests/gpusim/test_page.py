"""The examples of the developer page run as they stand."""

import re
from pathlib import Path

from .test_kernels import needs_nvrtc, needs_triton

PAGE = Path(__file__).parents[2] / "docs" / "gpu" / "index.md"


@needs_nvrtc
@needs_triton
def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    ratio, dram_bytes = capsys.readouterr().out.split()
    assert float(ratio) == 1.0
    assert int(dram_bytes) == 8000
