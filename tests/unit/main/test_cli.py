"""What the command says to words that it cannot use, and in its help."""

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


@pytest.mark.parametrize("command", ["train", "plan"])
def test_only_the_recipe_is_required(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("required: RECIPE\n")


def test_help_leads_to_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for option in ("--help", "--keys"):
        with pytest.raises(SystemExit) as ended:
            main(["train", option])
        assert ended.value.code == 0
        told.append(capsys.readouterr().out)
    assert "--keys" in told[0] and "training.global_batch_size" in told[1]


def test_far_words_name_all_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["zzz"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "invalid choice: 'zzz'" in told and "inspect" in told and "did you" not in told
