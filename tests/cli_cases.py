"""The command line, run inside the process of the tests."""

from __future__ import annotations

import pytest

from semid.cli import main


def run(*arguments: object) -> int:
    """Run `semid` with these arguments and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)
