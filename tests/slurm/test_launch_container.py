"""The launch scripts with a container image: what srun gets from them, and what they refuse."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

import pytest
import yaml

from tests.slurm.stand_ins import JOB, ROOT, TINY, Stage


def test_ranks_start_in_the_container(cluster_login: Stage) -> None:
    image, mounts = "registry.example#team/megavl:0.2", "/lustre:/lustre,/data:/data:ro"
    checkpoints = cluster_login.folder / "kept elsewhere"
    settings = {"CONTAINER": image, "CONTAINER_MOUNTS": mounts, "EXTRA": f'checkpoint.dir="{checkpoints}"'}
    code, _, err = cluster_login.run(**settings, **JOB)
    assert code == 0, err
    (call,) = cluster_login.called("srun")
    mounted = ",".join(f"{folder}:{folder}" for folder in (ROOT, cluster_login.run_dir, checkpoints))
    expected = {f"--container-image={image}", f"--container-mounts={mounted},{mounts}", f"--container-workdir={ROOT}"}
    assert {*expected, "--no-container-entrypoint"} <= set(call)
    assert call[call.index("rank") + 1 :][:4] == ["python", "-m", "megavl", "train"]
    # A folder that is mounted must be there; nothing of the launcher's own stays in it.
    assert checkpoints.is_dir() and list(cluster_login.run_dir.iterdir()) == []


def test_a_refused_start_is_told_out_of_the_container(cluster_login: Stage) -> None:
    """The container has a /tmp of its own, so the status of a refused run is written below the run's directory."""
    says = 'echo "{\\"code\\": 2}" >"$MEGAVL_EXIT_STATUS"'
    (cluster_login.folder / "bin/srun").write_text(f"#!/bin/bash\n{says}\nexit 137\n")
    code, _, err = cluster_login.run(CONTAINER="megavl", **JOB, TMPDIR="/nonexistent")
    assert code == 2 and not cluster_login.called("scontrol", "requeue"), err


def test_an_image_file_is_found_from_the_callers_folder(cluster_login: Stage) -> None:
    image = cluster_login.folder / "megavl.sqsh"
    image.touch()
    code, out, err = cluster_login.run(cwd=cluster_login.folder, CONTAINER="megavl.sqsh", DRY_RUN="1", **JOB)
    assert code == 0, err
    assert f"--container-image={image}" in shlex.split(out) and not cluster_login.run_dir.exists()


def mounts_of(stage: Stage, **settings: str) -> list[str]:
    code, out, err = stage.run(CONTAINER="megavl", DRY_RUN="1", **settings, **JOB)
    assert code == 0, err
    (found,) = [word for word in shlex.split(out) if word.startswith("--container-mounts=")]
    return found.removeprefix("--container-mounts=").split(",")


def test_folders_behind_links_are_mounted(cluster_login: Stage) -> None:
    scratch, link = cluster_login.folder / "scratch", cluster_login.folder / "link"
    scratch.mkdir()
    link.symlink_to(scratch)
    found = mounts_of(cluster_login, RUN_DIR=os.path.relpath(link / "a", ROOT))
    assert found == [f"{ROOT}:{ROOT}", f"{scratch}/a:{link}/a", f"{scratch}/a:{scratch}/a"]


def test_what_ranks_read_is_mounted_read_only(cluster_login: Stage) -> None:
    folder = cluster_login.folder
    names = ("mine/recipe.yaml", "base.yaml", "start", "packed/tokenizer")
    recipe, base, start, tokenizer = (folder / name for name in names)
    for made in (recipe.parent, start, tokenizer):
        made.mkdir(parents=True)
    shutil.copy(ROOT / "launch/recipes/tiny/base.yaml", base)
    own = yaml.safe_load((ROOT / TINY).read_text())
    recipe.write_text(yaml.safe_dump({**own, "base": "../base.yaml"}))
    given = {"RECIPE": str(recipe), "INIT": str(start), "TOKENIZER": str(tokenizer), "DATA": str(folder / "packed")}
    found = mounts_of(cluster_login, **given)
    run = cluster_login.run_dir
    read = [f"{path}:{path}:ro" for path in (recipe, base, start, tokenizer, folder / "packed")]
    assert found == [*read, f"{ROOT}:{ROOT}", f"{run}:{run}"]
    # What the user mounts is not mounted twice.
    theirs = f"{folder}/start:{folder}/start"
    assert f"{start}:{start}:ro" not in mounts_of(cluster_login, CONTAINER_MOUNTS=theirs, **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"RUN_DIR": "/a,b"}, "/a,b cannot be mounted"), ({"EXTRA": "checkpoint.dir=/a:b"}, "/a:b cannot be mounted")],
)
def test_a_folder_that_cannot_be_mounted_is_refused(
    cluster_login: Stage, settings: dict[str, str], message: str
) -> None:
    code, _, err = cluster_login.run(CONTAINER="megavl", **settings)
    assert code == 2 and message in err and not cluster_login.called("sbatch"), err


def test_without_slurm_a_container_is_refused(plain_machine: Stage) -> None:
    code, _, err = plain_machine.run(CONTAINER="megavl")
    assert code == 2 and "needs SLURM with pyxis" in err


def test_an_interpreter_without_packages_is_answered(cluster_login: Stage) -> None:
    bare = cluster_login.folder / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, _, err = cluster_login.run(PYTHON=str(bare))
    assert code == 2 and "pip install" in err and "Traceback" not in err, err
    assert not cluster_login.called("sbatch")


def test_an_old_interpreter_is_answered(cluster_login: Stage) -> None:
    pretend = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_module(sys.argv[1], run_name='__main__')"
    old = cluster_login.folder / "python"
    old.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} -c {shlex.quote(pretend)} "$@"\n')
    old.chmod(0o755)
    code, _, err = cluster_login.run(PYTHON=str(old))
    assert code == 2 and "is Python 3.9, too old" in err and "Traceback" not in err, err
