"""A misspelt subcommand is answered with the nearest one."""

from __future__ import annotations

import pytest

from megavl.main.cli import main


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["trian", "recipe.yaml"], "train"),
        (["plna", "recipe.yaml", "--devices", "8"], "plan"),
        (["evalaute"], "evaluate"),
        (["convert", "form-hf", "a", "b"], "from-hf"),
        (["convert", "verfy", "a", "b"], "verify"),
        (["plan", "recipe.yaml", "--device", "h20"], "h200"),
    ],
)
def test_misspelt_choices_name_the_nearest(words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_far_words_name_all_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["zzz"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "invalid choice: 'zzz'" in told and "inspect" in told and "did you" not in told
