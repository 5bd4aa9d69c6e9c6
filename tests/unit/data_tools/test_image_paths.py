"""How records name images: paths under several roots, links, file URLs, and base64 in every spelling."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.unit.data.corpus_files import make_tokenizer, run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import member, picture, read_back, rejects, write_tar


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _save(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return path


def _run(root: Path, tokenizer: Path, names: Sequence[str], *more: str, code: int = 0) -> Path:
    """Captions of these images beside one that is inside its record, so that the run starts."""
    inline = "data:image/png;base64," + base64.b64encode(picture(0)).decode()
    path = root / "in.jsonl"
    # Some names are no UTF-8.
    path.write_text("".join(json.dumps({"image": name, "text": "red"}) + "\n" for name in [inline, *names]))
    out = root / "out"
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--max-bad-frac", "1", *more]) == code
    return out


def _images(out: Path) -> list[bytes]:
    return [image for sample in read_back(out) for image in sample.images][1:]


def _details(out: Path) -> list[str]:
    return [json.loads(line)["detail"] for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_the_first_root_that_holds_a_file_wins(tokenizer: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _save(first / "both.png", 1), _save(second / "both.png", 2), _save(second / "x/only.png", 3)
    names = ["both.png", "x/only.png", str(second / "both.png"), "gone.png", "../secret.png"]
    out = _run(tmp_path, tokenizer, names, "--image-root", str(first), str(second))
    assert _images(out) == [picture(1), picture(3), picture(2)]
    assert rejects(out) == [("image_missing", "in.jsonl:5"), ("image_outside_root", "in.jsonl:6")]
    assert f"outside --image-root {first} {second}" in _details(out)[1]


def test_links_are_followed_on_request(tokenizer: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    outside = _save(tmp_path / "outside/1.png", 1)
    _save(tmp_path / "secret.png", 2)
    root.mkdir()
    (root / "file.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    names = ["file.png", "folder/1.png", "folder/../file.png", "folder/../secret.png", "../secret.png"]
    out = _run(tmp_path, tokenizer, names, "--image-root", str(root))
    assert [reason for reason, _ in rejects(out)] == [
        *["image_outside_root"] * 3,
        "image_missing",
        "image_outside_root",
    ]
    assert all(f"leads to {outside}" in text and "--follow-links" in text for text in _details(out)[:3])
    # Another setting is another run.
    assert _run(tmp_path, tokenizer, names, "--image-root", str(root), "--follow-links", code=2) == out
    out = _run(tmp_path, tokenizer, names, "--image-root", str(root), "--follow-links", "--no-resume")
    assert _images(out) == [picture(1)] * 3
    assert [reason for reason, _ in rejects(out)] == ["image_missing", "image_outside_root"]
    # A link from one root to another leads nowhere else.
    out = _run(tmp_path, tokenizer, names[:2], "--image-root", str(root), str(outside.parent), "--no-resume")
    assert _images(out) == [picture(1)] * 2


def test_paths_of_windows_are_read(tokenizer: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    _save(root / "a b/1.png", 1), _save(root / "2\\3.png", 2), _save(root / "2/3.png", 3), _save(tmp_path / "4.png", 4)
    names = ["a b\\1.png", ".\\a b\\1.png", "2\\3.png", "..\\4.png", "C:\\a b\\1.png"]
    out = _run(tmp_path, tokenizer, names, "--image-root", str(root))
    # A file that is called so comes first.
    assert _images(out) == [picture(1), picture(1), picture(2)]
    assert [reason for reason, _ in rejects(out)] == ["image_missing"] * 2


def test_file_urls_are_paths(tokenizer: Path, tmp_path: Path) -> None:
    root = tmp_path / "a root"
    path = _save(root / "ä 1%.png", 1)
    _save(tmp_path / "secret.png", 2)
    plain = f"file://{quote(str(path))}"
    good = [plain, plain.replace("//", "//localhost", 1), plain.upper()[:5] + plain[5:], plain.replace("//", "", 1)]
    good += [f"file://{root}/ä 1%25.png", f"file:///{quote(str(path))}"]
    bad = {
        f"file://{tmp_path}/secret.png": "image_outside_root",
        f"file://{quote(str(root))}/%2e%2e/secret.png": "image_outside_root",
        f"file://{root}/gone.png": "image_missing",
        f"file://{root}/%00.png": "image_missing",
        f"file://{root}/\ud800.png": "image_missing",
        f"file://server{path}": "image_address",
        "file://a.png": "image_address",
        "file://images/a.png": "image_address",
        "file:a.png": "image_missing",
        "file:///": "image_outside_root",
        "https://example.org/a.png": "image_address",
        "s3://bucket/a.png": "image_address",
    }
    out = _run(tmp_path, tokenizer, [*good, *bad], "--image-root", str(root))
    assert _images(out) == [picture(1)] * len(good)
    assert [reason for reason, _ in rejects(out)] == list(bad.values())


def _spellings(data: bytes) -> list[str]:
    code = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    bare = [code, code.rstrip("="), safe, lines, lines.replace("\n", "\r\n"), f"  {code}\n"]
    heads = ["data:image/png;charset=utf-8;base64,", "DATA:image/PNG;BASE64,", "data:;base64,", "data:image/png,"]
    heads += [
        "data:application/octet-stream;base64,",
        "data:image/png;name=a b.png;base64,",
        " data:image/png; base64,",
    ]
    return [*bare, *(head + text for head in heads for text in (code, lines)), heads[0] + quote(code, safe="")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_is_read_in_every_spelling(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    data = picture(3, kind=kind)
    names = _spellings(data)
    assert _images(_run(tmp_path, tokenizer, names)) == [data] * len(names)


def test_bad_base64_is_refused_by_its_reason(tokenizer: Path, tmp_path: Path) -> None:
    code = base64.b64encode(picture(1, kind="JPEG")).decode()
    names = {
        code[:200]: "image_truncated",
        code[:41]: "image_format",
        base64.b64encode(bytes(6000)).decode(): "image_format",
        f"data:image/png;base64,{code}*": "image_format",
        "data:image/png;base64": "image_format",
        "data:image/svg+xml,%3Csvg%2F%3E": "image_format",
        "data:image/png;base64,": "image_empty",
    }
    out = _run(tmp_path, tokenizer, list(names))
    assert [reason for reason, _ in rejects(out)] == list(names.values())
    assert all("image-root" not in text for text in _details(out))


def test_a_long_path_without_a_dot_is_a_path(tokenizer: Path, tmp_path: Path) -> None:
    names = ["9j/images/" + "a" * 200 + "/sha256-00112233445566778899aabbccddeeff", "day=1/" + "b c/" * 50 + "x="]
    for name in names:
        _save(tmp_path / name, 1)
    assert _images(_run(tmp_path, tokenizer, names)) == [picture(1)] * 2


def test_a_run_without_any_image_ends_at_its_start(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "root").mkdir()
    path = write_jsonl(tmp_path / "in.jsonl", [{"image": f"{n}.png", "text": "red"} for n in range(300)])
    out = tmp_path / "out"
    for more in ([], ["--dry-run"], ["--dry-run", "--limit", "9"], ["--task", "1", "--num-tasks", "2"]):
        roots = [str(tmp_path), str(tmp_path / "root")]
        options = ["--image-root", *roots, *more]
        assert run_preprocess([path], tokenizer=tokenizer, output=out, more=options) == 2
        error = capsys.readouterr().err
        assert f"error: --image-root {' '.join(roots)}: holds none of the first " in error
        assert "images (0.png, 1.png, 2.png); give the folders" in error and not out.exists()
    _save(tmp_path / "root/99.png", 1)
    more = ["--image-root", str(tmp_path / "root"), "--max-bad-frac", "1"]
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == 0
    # A run that has begun goes on, whatever became of its images.
    (tmp_path / "root/99.png").unlink()
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == 0


def test_a_folder_of_links_ends_the_run_at_its_start(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    target = _save(tmp_path / "store/1.png", 1)
    root.mkdir()
    (root / "0.png").symlink_to(target)
    (root / "folder").symlink_to(target.parent)
    names = ["0.png", "folder/1.png", "gone.png"]
    path = write_jsonl(tmp_path / "in.jsonl", [{"image": name, "text": "red"} for name in names])
    options = ["--image-root", str(root)]
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=options) == 2
    error = capsys.readouterr().err
    assert f"symbolic links lead out of it, such as 0.png to {target}; allow them with --follow-links" in error
    assert not out.exists()
    for more in (["--follow-links"], ["--image-root", str(root), str(target.parent)]):
        options = ["--image-root", str(root), "--no-resume", *more]
        assert run_preprocess([path], tokenizer=tokenizer, output=out, more=options) == 0
        assert rejects(out) == [("image_missing", "in.jsonl:3")]


def test_the_hundredth_image_is_still_looked_for(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"image": f"{n}.png", "text": "red"} for n in range(300)])
    _save(tmp_path / "100.png", 1)
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 2


def test_images_inside_records_need_no_root(tokenizer: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "red"}])
    tar = write_tar(tmp_path / "in.tar", [member("a.png", picture(1)), member("a.txt", b"red")])
    inline = "data:image/png;base64," + base64.b64encode(picture(2)).decode()
    address = "https://example.org/a.png"
    urls = write_jsonl(tmp_path / "urls.jsonl", [{"image": name, "text": "red"} for name in (inline, address)])
    out = tmp_path / "out"
    assert run_preprocess([text, tar, urls], tokenizer=tokenizer, output=out, more=["--image-root", str(tmp_path)]) == 0
    assert rejects(out) == [("image_address", "urls.jsonl:2")]


def test_an_image_root_must_be_a_folder(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "red"}])
    more = ["--image-root", str(tmp_path), str(tmp_path / "gone")]
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 2
    assert re.search(r"--image-root .*gone: no such folder", capsys.readouterr().err)


def test_roots_and_links_are_settings_of_the_run(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "red"}])
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--image-root", str(first), str(second)]) == 0
    for more in ([str(second), str(first)], [str(first)], [str(first), str(second), "--follow-links"]):
        assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--image-root", *more]) == 2
        changed = "follow_links" if "--follow-links" in more else "image_root"
        assert f"started with other settings or inputs ({changed})" in capsys.readouterr().err
