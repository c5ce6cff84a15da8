"""What a script does with the words of a command line, in this process."""

import pytest

from utils import cli


def call(script, *words):
    """What `python <script> <words>` does."""
    cli.run(script.main, script.parse_args([str(word) for word in words]))


def refusal(capsys, command, *words):
    """The one line of an error with exit status 2; notes are left out."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(*words)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert len(errors) == 1, lines
    return errors[0]
