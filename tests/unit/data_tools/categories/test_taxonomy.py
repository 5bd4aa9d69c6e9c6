"""Categories of fine-tuning data: the tree of the paper, tags, coverage, and weighted samples."""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from fractions import Fraction
from importlib import import_module

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import taxonomy
from data_tools.categories.sampling import choose, order
from data_tools.categories.tree import read_taxonomy
from data_tools.readers.formats import FORMATS

TREE = read_taxonomy()


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = taxonomy.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def talk(question, answer="Yes.", **more):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": question, "image": "images/a.png", "conversations": turns, **more}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tree_is_that_of_the_paper():
    leaves = Counter(leaf.id.split("/")[0] for leaf in TREE.leaves())
    assert leaves == {
        "recognition": 18,
        "conversion": 9,
        "analysis": 18,
        "commonsense": 20,
        "logic": 8,
        "evaluation": 5,
        "multi-image": 8,
        "safety": 3,
    }
    assert [category.name for id, category in TREE.categories.items() if id.startswith("conversion/code/")] == [
        "UI to code",
        "Chart to code",
        "Photo to SVG or base64 encoding",
        "Formula to code",
        "Flowchart to code",
    ]
    assert (
        sum(category.level == 1 for category in TREE.categories.values()) == 8
        and max(category.level for category in TREE.categories.values()) == 3
    )


def test_list_shows_every_category(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0 and len(out.splitlines()) == len(TREE.categories)
    assert "    conversion/code/ui: UI to code\n" in out
    assert len(run(capsys, "list", "--depth", 1)[1].splitlines()) == 8


@pytest.mark.parametrize(
    ("given_id", "nearest"),
    [
        ("recogntion/ocr", "recognition/ocr"),
        ("UI to code", "conversion/code/ui"),
        ("counting", "recognition/local/counting"),
        ("qqqq", None),
    ],
)
def test_unknown_categories_name_the_nearest(tmp_path, capsys, given_id, nearest):
    source = write(tmp_path / "in.jsonl", [talk("a", category="safety"), talk("b", category=given_id)])
    code, _, err = run(capsys, "tag", "--input", source, "--output", tmp_path / "out.jsonl")
    assert code == 3 and err.count("\n") == 1
    assert f"{source}:2: category: unknown category {given_id!r}" in err
    assert (f"the nearest is {nearest!r}" in err) if nearest else ("nearest" not in err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_tags_come_from_fields_names_and_rules(tmp_path, capsys):
    records = [
        talk("one", topic="logic/mathematics"),
        talk("two", topic="maths"),
        talk("How many cats are there?"),
        talk("Is the account blocked?"),
        talk("请数一数，图中有几只猫？"),
        talk("What is it?", answer="A count of 3"),
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Count   the things"}, {"type": "image"}]}
            ]
        },
        {"image": "images/b.png", "text": "A poem about the sea"},
    ]
    (tmp_path / "in.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    (tmp_path / "names.yaml").write_text("maths: logic/mathematics/algebra\n")
    rules = {
        "recognition/local/counting": {"words": ["how many", "count the", "count", "几只"], "in": "question"},
        "conversion/text/creation": ["poem"],
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules, allow_unicode=True), encoding="utf-8")
    options = ["--input", tmp_path / "in.json", "--field", "topic", "--names", tmp_path / "names.yaml"]
    options += ["--rules", tmp_path / "rules.yaml"]
    code, out, _ = run(capsys, "tag", *options, "--output", tmp_path / "out.jsonl")
    assert code == 0 and "2 by field, 4 by rule, 2 without" in out
    counting = "recognition/local/counting"
    assert [record.get("category") for record in lines(tmp_path / "out.jsonl")] == [
        "logic/mathematics",
        "logic/mathematics/algebra",
        counting,
        None,
        counting,
        None,
        counting,
        "conversion/text/creation",
    ]
    assert [{k: v for k, v in record.items() if k != "category"} for record in lines(tmp_path / "out.jsonl")] == records
    assert run(capsys, "tag", *options, "--output", tmp_path / "out.jsonl")[0] == 2
    dropping = [*options, "--untagged", "drop", "--force"]
    assert run(capsys, "tag", *dropping, "--output", tmp_path / "out.jsonl")[0] == 0
    assert len(lines(tmp_path / "out.jsonl")) == 6
    code, _, err = run(capsys, "tag", *options, "--untagged", "fail", "--output", tmp_path / "new.jsonl")
    assert code == 3 and "in.json, item 4: has no topic and matches no rule" in err


def test_report_counts_records_by_category(tmp_path, capsys):
    counted = {"safety": 1, "recognition/ocr/printed": 4, "recognition/ocr": 2, "evaluation/reality": 3}
    records = [talk(f"{id} {n}", category=id) for id, count in counted.items() for n in range(count)]
    source = write(tmp_path / "in.jsonl", [*records, talk("none")])
    options = ["--input", source, "--json", tmp_path / "c.json", "--svg", tmp_path / "c.svg"]
    code, out, _ = run(capsys, "report", *options, "--depth", 2)
    assert code == 0
    rows = {row.split()[0]: row.split()[1:] for row in out.splitlines()[:-1]}
    assert rows["recognition"][:2] == ["6", "60.0%"] and rows["recognition"][2] == "#" * 18
    assert rows["recognition/ocr"][0] == "6" and rows["recognition/local"] == ["0", "0.0%"]
    assert out.splitlines()[-1] == "10 records with a category, 1 without; 2 of 89 leaves have records"
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["categories"]["recognition/ocr/printed"] == 4 and len(content["missing"]) == 87
    drawing = ElementTree.parse(tmp_path / "c.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    labels = [text.text for text in drawing.iter(f"{space}text")]
    assert "OCR and transcription" in labels and "6 (60.0%)" in labels
    bars = [float(bar.get("width")) for bar in drawing.iter(f"{space}rect")]
    assert len(bars) == len(rows) and max(bars) == 420.0 and bars[0] == 420.0


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9),
    st.integers(1, 150),
)
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_its_shares(weights, count):
    shares = {str(n): Fraction(weight, sum(weights)) for n, weight in enumerate(weights)}
    taken = Counter()
    for length, chosen in enumerate(order(shares, count=count), start=1):
        taken[chosen] += 1
        assert max(abs(taken[id] - share * length) for id, share in shares.items()) < 1
    assert sum(taken.values()) == count


def test_no_record_repeats_before_all_were_used():
    first = choose(10, count=25, seed=0, category="x")
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    assert first == choose(10, count=25, seed=0, category="x") != choose(10, count=25, seed=1, category="x")
    assert choose(0, count=0, seed=0, category="x") == []


@pytest.fixture
def pool(tmp_path):
    """Two files in different folders, with images beside them."""
    first = [talk(f"logic {n}", category=f"logic/{'mathematics' if n % 2 else 'other/physics'}") for n in range(30)]
    second = [talk(f"ocr {n}", category="recognition/ocr/printed") for n in range(20)] + [talk("none")]
    return [write(tmp_path / "a/in.jsonl", first), write(tmp_path / "b/in.jsonl", second)]


def sample(capsys, pool, tmp_path, *options, weights="logic: 0.3\nrecognition/ocr: 0.1\n"):
    (tmp_path / "weights.yaml").write_text(weights)
    return run(
        capsys,
        "sample",
        "--input",
        *pool,
        "--weights",
        tmp_path / "weights.yaml",
        "--output",
        tmp_path / "out.jsonl",
        *options,
    )


def test_sample_has_exact_shares(tmp_path, capsys, pool):
    code, out, _ = sample(capsys, pool, tmp_path, "--count", 36)
    assert code == 0 and "logic: 27 of 30 records (75.0%)" in out
    found = lines(tmp_path / "out.jsonl")
    tops = [record["category"].split("/")[0] for record in found]
    assert Counter(tops) == {"logic": 27, "recognition": 9}
    assert all(abs(tops[:n].count("logic") - 0.75 * n) < 1 for n in range(len(tops)))
    assert len({record["id"] for record in found}) == 36
    assert {record["image"] for record in found} == {"a/images/a.png", "b/images/a.png"}
    (picture,) = FORMATS["llava"].read(found[0]).images
    assert picture.name == found[0]["image"]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert sample(capsys, pool, tmp_path, "--count", 36)[0] == 2
    assert sample(capsys, pool, tmp_path, "--count", 36, "--force")[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sample(capsys, pool, tmp_path, "--count", 36, "--force", "--seed", 1)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() != before


def test_too_few_records_are_an_error(tmp_path, capsys, pool):
    code, _, err = sample(capsys, pool, tmp_path, "--count", 100)
    assert code == 3 and "logic has 30 of 75, recognition/ocr has 20 of 25" in err and "--repeat" in err
    assert not (tmp_path / "out.jsonl").exists()
    assert sample(capsys, pool, tmp_path, "--count", 100, "--repeat")[0] == 0
    times = Counter(record["id"] for record in lines(tmp_path / "out.jsonl"))
    assert {times[f"logic {n}"] for n in range(30)} == {2, 3} and {times[f"ocr {n}"] for n in range(20)} == {1, 2}
    code, _, err = sample(capsys, pool, tmp_path, "--count", 9, "--repeat", "--force", weights="safety: 1\nlogic: 1\n")
    assert code == 3 and "safety has 0 of" in err


@pytest.mark.parametrize(
    ("weights", "code", "expected"),
    [
        ("logic: 1\nlogic/other: 2\n", 2, "logic/other is a part of logic"),
        ("logik: 1\n", 3, "unknown category 'logik', the nearest is 'logic'"),
        ("logic: -1\n", 2, "logic: a weight is a number from 0, found -1"),
        ("logic: yes\n", 2, "a weight is a number from 0, found True"),
        ("logic: 0\n", 2, "every weight is 0"),
        ("- logic\n", 2, "expected a mapping"),
        ("logic: [", 2, "cannot be read"),
        ("logic: !!python/object/apply:os.getcwd []\n", 2, "cannot be read"),
    ],
)
def test_bad_weights_are_refused(tmp_path, capsys, pool, weights, code, expected):
    found, _, err = sample(capsys, pool, tmp_path, "--count", 3, weights=weights)
    assert found == code and expected in err and err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        ('{"id": 1}\n{"id": \n', 3, "in.jsonl:2: not valid JSON"),
        ("[1]\n[2]\n", 3, "in.jsonl:1: a record with a category is an object"),
        ('{"category": 3}\n', 3, "in.jsonl:1: category must be a category's id"),
        (None, 2, "in.jsonl: no such file"),
    ],
)
def test_bad_records_are_refused(tmp_path, capsys, content, code, expected):
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    found, _, err = run(capsys, "report", "--input", tmp_path / "in.jsonl")
    assert found == code and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rules", "logic: word\n", "logic: expected a list of words"),
        ("rules", "logic: {words: [a], in: title}\n", "in must be one of question, answer, any, found 'title'"),
        ("rules", "logic: {words: []}\n", "words must be a list of texts"),
        ("taxonomy", "Logic: x\n", "key 'Logic' below 'the top'"),
        ("taxonomy", "logic: {title: x}\n", "logic must be a name, or have name, about and parts"),
        ("taxonomy", "logic: {name: x, parts: [y]}\n", "logic: parts must be a mapping"),
    ],
)
def test_bad_settings_are_refused(tmp_path, capsys, name, content, expected):
    source = write(tmp_path / "in.jsonl", [talk("a")])
    (tmp_path / "settings.yaml").write_text(content)
    code, _, err = run(capsys, "report", "--input", source, f"--{name}", tmp_path / "settings.yaml")
    assert code == 2 and expected in err and err.count("\n") == 1


def test_image_paths_follow_the_output(tmp_path, capsys):
    records = [
        {"id": 1, "image": "i/a.png", "category": "safety"},
        {"id": 2, "images": ["i/a.png", "data:image/png;base64,AA", "/abs/b.png"], "category": "safety"},
        {"id": 3, "conversations": [{"role": "User", "content": "x", "images": ["i/c.png"]}], "category": "safety"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "i/d"}]}], "category": "safety"},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "i/e.png"}}]}], "category": "safety"},
        {
            "image": {"bytes": None, "path": "i/f.png"},
            "text": "see i/f.png",
            "source": "http://x/y.png",
            "category": "safety",
        },
        {
            "images": '["i/g.png", null]',
            "conversations": "[{'from': 'human', 'images': ['i/h.png']}]",
            "category": "safety",
        },
    ]
    source = write(tmp_path / "a/b/in.jsonl", records)
    options = ["tag", "--input", source, "--output", tmp_path / "a/out.jsonl"]
    assert run(capsys, *options)[0] == 0
    one, two, three, *others = lines(tmp_path / "a/out.jsonl")
    assert others[0]["messages"][0]["content"][0]["image"] == "b/i/d"
    assert others[1]["messages"][0]["content"][0]["image_url"]["url"] == "b/i/e.png"
    assert others[2]["image"]["path"] == "b/i/f.png"
    assert (others[2]["text"], others[2]["source"]) == ("see i/f.png", "http://x/y.png")
    assert json.loads(others[3]["images"]) == ["b/i/g.png", None]
    assert json.loads(others[3]["conversations"])[0]["images"] == ["b/i/h.png"]
    assert one["image"] == "b/i/a.png" and two["images"] == ["b/i/a.png", "data:image/png;base64,AA", "/abs/b.png"]
    assert three["conversations"][0]["images"] == ["b/i/c.png"]
    options = ["tag", "--input", source, "--output", tmp_path / "c/out.jsonl"]
    code, _, err = run(capsys, *options)
    assert code == 2 and "give --image-root with a folder above all inputs" in err
    assert run(capsys, *options, "--image-root", tmp_path)[0] == 0
    assert lines(tmp_path / "c/out.jsonl")[0]["image"] == "a/b/i/a.png"


@pytest.mark.parametrize("name", ["documents", "notebooks", "screens", "scenetext"])
def test_builders_name_categories_that_exist(name):
    category = import_module(f"data_tools.corpus.pairs.{name}.build").CATEGORY
    assert category in [leaf.id for leaf in TREE.leaves()]
