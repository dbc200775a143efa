"""Reading the scenes of a batch: files, folders, tables with templates; a bad one spoils no other."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import call
from lora_compose.compose.batch import tables
from lora_compose.compose.batch.command import write_plan
from lora_compose.compose.batch.entries import BatchScenes, Entry, read_entries
from lora_compose.compose.batch.settings import BatchSettings, parse_seeds
from lora_compose.compose.files.reading import FileError
from lora_compose.pipelines.scene.scene import Concept

TEMPLATE = {
    "prompt": "a {trigger} {animal} on {place}",
    "concepts": [
        {
            "name": "{animal}", "lora": "playground:{animal}", "trigger": "{trigger}", "class_word": "{animal}",
            "region": "{box}", "weight": "{weight}",
        }
    ],
}  # fmt: skip
TABLE = """\
name,trigger,animal,place,box,weight,seed,_note
one,xlo,bear,"grass,
and snow","[0, 16, 60, 112]",0.5,0-2,why not

,qrt,robot,sand,,,,
"""


def written(folder: Path, **texts: Any) -> list[Path]:
    """Files of these names, with "_" for the point of the suffix."""
    paths = []
    for name, text in texts.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
        paths.append(path)
    return paths


def of_table(folder: Path, text: str, suffix: str = "csv", template: Any = TEMPLATE) -> BatchScenes:
    table, form = written(folder, **{f"rows_{suffix}": text, "form_yaml": template})
    return read_entries([table], form)


def test_columns_fill_the_placeholders_of_a_template(tmp_path: Path) -> None:
    found = of_table(tmp_path, TABLE)
    assert found.bad == ()
    one, other = found.entries
    assert (one.name, one.seeds, one.source) == ("one", (0, 1, 2), f"{tmp_path}/rows.csv, line 2")
    assert one.scene.prompt == "a xlo bear on grass,\nand snow"
    (bear,) = one.scene.concepts
    assert (bear.name, bear.lora, bear.region, bear.weight) == ("bear", "playground:bear", (0, 16, 60, 112), 0.5)
    assert (other.name, other.seeds) == ("rows-0005", None), "the line where it stands"
    assert (other.scene.concepts[0].region, other.scene.concepts[0].weight) == (None, None), "empty cells are left out"


@pytest.mark.parametrize("mark", [";", "\t"])
def test_spreadsheets_separate_cells_in_other_ways(tmp_path: Path, mark: str) -> None:
    table = mark.join(("prompt", "width")) + "\r\n" + mark.join(("one, two", "64")) + "\r\n"
    (path,) = written(tmp_path, rows_csv="\ufeff" + table)
    (entry,) = read_entries([path]).entries
    assert (entry.scene.prompt, entry.scene.width) == ("one, two", 64)


def test_rows_of_json_have_values_of_their_kind_and_may_be_whole_scenes(tmp_path: Path) -> None:
    text = (
        '{"trigger": "xlo", "animal": "bear", "place": "a {place}", "box": [0, 16, 60, 112], "weight": null}\n\n'
        '{"trigger": "qrt", "animal": "robot", "place": 7, "box": null, "weight": [1, 0.5], "seeds": [3, 5]}\n'
    )
    one, other = of_table(tmp_path, text, "jsonl").entries
    assert one.scene.prompt == "a xlo bear on a {place}", "values are no templates"
    assert (one.scene.concepts[0].region, one.seeds) == ((0, 16, 60, 112), None)
    assert (other.scene.prompt, other.seeds) == ("a qrt robot on 7", (3, 5))
    (path,) = written(tmp_path, whole_jsonl='{"prompt": "a", "concepts": [{"name": "b", "lora": "playground:bear"}]}')
    assert read_entries([path]).entries[0].scene.concepts[0].lora == "playground:bear"
    (path,) = written(tmp_path, other_jsonl='{"prompt": "a", "concepts": [{"name": "man", "role": "bystander"}]}')
    assert read_entries([path]).entries[0].scene.concepts[0].is_bystander


def test_concepts_of_all_rows_beside_a_column_of_prompts(tmp_path: Path) -> None:
    (path,) = written(tmp_path, prompts_csv="prompt\na xlo bear\na xlo bear on sand\n")
    concept = Concept(name="bear", lora="playground:bear", trigger="{x}")
    found = read_entries([path], None, [concept])
    assert [entry.scene.prompt for entry in found.entries] == ["a xlo bear", "a xlo bear on sand"]
    assert all(entry.scene.concepts == (concept,) for entry in found.entries), "braces of options are braces"


def test_bad_rows_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    rows = [
        "trigger,animal,place,box,weight,seed",
        "xlo,bear,grass,,,",
        "xlo,fox,grass,,,",
        "xlo,bear,grass",
        "xlo,bear,grass,,,five",
        'xlo,bear,grass,"[60, 0, 10, 9]",,',
        "xlo,bear,grass,,much,",
        "qrt,robot,sand,,,",
    ]
    found = of_table(tmp_path, "\n".join(rows))
    assert [entry.source for entry in found.entries] == [f"{tmp_path}/rows.csv, line {n}" for n in (2, 8)]
    expected = ["no LoRA 'fox'", "3 cells, but the header has 6", "'five' is no seed", "region", "weight"]
    assert len(found.bad) == len(expected)
    for line, (bad, words) in enumerate(zip(found.bad, expected, strict=True), 3):
        assert bad.error.startswith(f"{tmp_path}/rows.csv, line {line}: ")
        assert words in bad.error


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"trigger": "xlo"', "not valid JSON"),
        ("[1]", "expected one row"),
        ('{"trigger": "xlo", "animal": "bear", "box": null, "weight": 1}', "no column for the template's {place}"),
        ('{"trigger": "a", "animal": "bear", "place": [1], "box": null, "weight": 1}', "cannot stand within a text"),
        ('{"trigger": "a", "trigger": "b"}', "'trigger' is given twice"),
    ],
)
def test_a_bad_row_of_json_is_named(tmp_path: Path, row: str, expected: str) -> None:
    good = '{"trigger": "xlo", "animal": "bear", "place": "grass", "box": null, "weight": 1}'
    found = of_table(tmp_path, f"{good}\n{row}\n", "jsonl")
    assert len(found.entries) == 1
    (bad,) = found.bad
    assert bad.error.startswith(f"{tmp_path}/rows.jsonl, line 2: ")
    assert expected in bad.error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: there is no header"),
        ("prompt\n", "has no rows"),
        ("prompt,,x\na,b,c\n", "column 2 has no name"),
        ("prompt,prompt\na,b\n", "the column 'prompt' stands twice"),
        ("prompt,anmal\na,b\n", "nothing reads the column 'anmal'; expected"),
        ("promt\na\n", "did you mean 'prompt'?"),
        ("seed,seeds\n1,2\n", "not both"),
    ],
)
def test_a_header_that_cannot_be_read_is_reported_at_once(tmp_path: Path, text: str, expected: str) -> None:
    (path,) = written(tmp_path, rows_csv=text)
    with pytest.raises(FileError, match=r"rows\.csv") as error:
        read_entries([path])
    assert expected in str(error.value)


def test_a_placeholder_without_a_column(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no column for the template's \{animal\}"):
        of_table(tmp_path, "trigger,place\na,b\n")


def test_text_that_is_no_table_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt\na\nb\xff\n")
    with pytest.raises(FileError, match="line 3: not UTF-8"):
        read_entries([path])
    path.write_text('prompt\na\n"b' + "c" * 200_000)
    found = read_entries([path])
    assert [entry.scene.prompt for entry in found.entries] == ["a"]
    assert "line 3: not valid CSV" in found.bad[0].error
    monkeypatch.setattr(tables, "MOST_ROWS", 1)
    path.write_text("prompt\na\nb\n")
    with pytest.raises(FileError, match="more than 1 rows"):
        read_entries([path])
    monkeypatch.setattr(tables, "MOST_BYTES", 5)
    with pytest.raises(FileError, match="larger than 5 bytes"):
        read_entries([path])


def test_a_folder_has_a_scene_in_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    written(folder, b_yaml={"prompt": "b"}, a_json='{"prompt": "a"}', c_yaml="prompt: [", d_yaml={"promt": "d"})
    (folder / "notes.txt").write_text("no scene")
    (folder / "a.png").touch()
    found = read_entries(
        [folder, *written(tmp_path, e_yaml={"prompt": "e"}), *written(tmp_path, a_yaml={"prompt": "f"})]
    )
    assert [(entry.name, entry.scene.prompt) for entry in found.entries] == [("a", "a"), ("b", "b"), ("e", "e")]
    told = [bad.error for bad in found.bad]
    assert told[0].startswith(f"{folder}/c.yaml, line 1")
    assert f"{folder}/d.yaml: promt: unknown field" in told[1]
    assert told[2] == f"{tmp_path}/a.yaml: the name 'a' is taken by {folder}/a.json"


def test_relative_paths_begin_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").touch()
    concept = {"name": "a", "lora": "own.safetensors"}
    for path in written(tmp_path, scene_yaml={"prompt": "a", "concepts": [concept]}):
        (entry,) = read_entries([path]).entries
        assert entry.scene.concepts[0].lora == str(tmp_path / "own.safetensors")
    table, form = written(tmp_path, t_csv="lora\nown.safetensors\n", f_yaml={
        "prompt": "a", "concepts": [{**concept, "lora": "{lora}"}]
    })  # fmt: skip
    assert read_entries([table], form).entries[0].scene.concepts[0].lora == str(tmp_path / "own.safetensors")


def test_a_batch_file_has_settings_and_scenes(tmp_path: Path) -> None:
    scenes = [{"name": "a", "prompt": "a", "seed": 4}, {"name": "b"}, {"prompt": "c"}, {"name": "d", "prompt": "d"}]
    (path,) = written(tmp_path, all_yaml={"model": "playground", "steps": 3, "seeds": "0-1", "scenes": scenes})
    found = read_entries([path])
    assert found.settings == {"model": "playground", "steps": 3, "seeds": "0-1"}
    assert [(entry.name, entry.seeds) for entry in found.entries] == [("a", (4,)), ("d", None)]
    assert [bad.error for bad in found.bad] == [
        f"{path}, scenes[1]: prompt: is missing",
        f"{path}, scenes[2]: name: expected a valid string, found nothing",
    ]
    with pytest.raises(FileError, match="give nothing else"):
        read_entries([path, path])
    (wrong,) = written(tmp_path, wrong_yaml={"model": "playground", "step": 3, "scenes": scenes})
    with pytest.raises(FileError, match=r"step: unknown field.*did you mean 'steps'"):
        read_entries([wrong])


def test_the_plan_of_a_batch_is_a_batch_file_with_the_same_scenes(tmp_path: Path) -> None:
    found = of_table(tmp_path, TABLE)
    settings = BatchSettings(model="playground", settings={"cfg_mask": "broadcast"}, method="tara", seeds=(1, 2))
    write_plan(tmp_path / "elsewhere" / "plan.json", found.entries, settings)
    again = read_entries([tmp_path / "elsewhere" / "plan.json"])

    def content(entries: tuple[Entry, ...]) -> list[Any]:
        return [(entry.name, entry.scene, entry.seeds) for entry in entries]

    assert content(again.entries) == content(found.entries)
    assert BatchSettings(**again.settings) == settings


def test_seeds_as_people_write_them() -> None:
    assert parse_seeds("3") == (3,)
    assert parse_seeds(3) == (3,)
    assert parse_seeds(["0-2", 7, "9"]) == (0, 1, 2, 7, 9)
    assert parse_seeds("1, 4-5,9") == (1, 4, 5, 9)
    for wrong in ("5-3", "-1", "1.5", "0-99999999", "a"):
        with pytest.raises(ValueError, match="seed"):
            parse_seeds(wrong)
    for wrong in ("1,1", [], True, 2**63):
        with pytest.raises(ValueError, match="seeds"):
            BatchSettings(model="playground", seeds=wrong)  # pyright: ignore[reportArgumentType]


def test_errors_in_settings_are_reported_before_anything_is_made(tmp_path: Path) -> None:
    (scene, bad) = written(tmp_path, a_yaml={"prompt": "a"}, b_yaml="prompt: [")
    out = ["--out", tmp_path / "out"]
    assert "there is no model; give --model" in call("batch", scene, *out, code=2).output
    assert "did you mean" in call("batch", scene, "--model", "plyground", *out, code=2).output
    assert "unknown method" in call("batch", scene, "--model", "playground", "--method", "tarra", *out, code=2).output
    assert "not valid YAML" in call("batch", bad, "--model", "playground", *out, code=2).output
    assert "are for tables" in call("batch", scene, "--template", scene, "--model", "playground", *out, code=2).output
    assert not (tmp_path / "out").exists()


def test_a_name_that_file_systems_do_not_take_is_a_bad_row(tmp_path: Path) -> None:
    (path,) = written(tmp_path, rows_csv="name,prompt\n" + "\u732b" * 90 + ",a\n" + "\u732b" * 60 + ",b\n")
    found = read_entries([path])
    assert [one.scene.prompt for one in found.entries] == ["b"]
    assert "270 bytes; expected at most 200" in found.bad[0].error
