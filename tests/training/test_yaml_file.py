"""The strict YAML reader (FAILURES F34)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recemb.errors import ConfigError
from recemb.training.yaml_file import parse_scalar, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+4", -25000.0),
        (".5", 0.5),
        ("12", 12),
        ("-0", 0),
        ("on", "on"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("017", "017"),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("null", None),
        ("~", None),
        ("nan", "nan"),
    ],
)
def test_f34_scalars_are_what_they_look_like(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    for read in (read_yaml(path).values["key"], parse_scalar(text)):
        assert read == value
        assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\n\na: 2\n", r":3: key 'a' is given twice, first on line 1"),
        (b"a: &x [1]\nb: *x\n", r":2: alias \*x is not allowed"),
        (b"a: &x\n  b: *x\n", r":2: alias"),
        (b"a: 1\nb: " + b"[" * 3000, r":2: nested deeper than 20 levels"),
        (b"{a: " * 3000, r":1: nested deeper than 20 levels"),
        (b"a: 1\nb: x\0y\n", r":2: character 0 is not allowed"),
        (b"a: 1\nb: !!python/object/apply:os.system [true]\n", r":2: tag 'python/object/apply:os.system'"),
        (b"a: !!binary aGk=\n", r":1: tag 'binary'"),
        (b"a: !!int x\n", r":1: a: not a number"),
        (b"a: " + b"9" * 5000, r":1: a: not a number"),
        (b"- 1\n- 2\n", r":1: the top level must be a mapping"),
        (b"1: 2\n", r":1: a key must be a plain word, not '1'"),
        (b"? [a]\n: 1\n", r":1: a key must be a plain word"),
        (b"a: [1, 2\nb: 3\n", r":\d: .*expected"),
        (b"a: 1\n---\nb: 2\n", r":2: .*expected a single document"),
        (b"a: 1\nb: \xff\n", r":2: not UTF-8 text \(byte 0xff\)"),
        (b"a: " + b"x" * (1 << 20), r"larger than 1048576 bytes"),
    ],
)
def test_f34_refused_with_a_line(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))


def test_f34_a_python_tag_runs_nothing(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    path = tmp_path / "evil.yaml"
    path.write_text(
        f"a: !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path '{sentinel}']\n"
    )
    with pytest.raises(ConfigError):
        read_yaml(path)
    assert not sentinel.exists()


def test_lines_and_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff# comment\nsizes: [8,\n  4]\nnested:\n  deep: x\n")
    document = read_yaml(path)
    assert document.values == {"sizes": [8, 4], "nested": {"deep": "x"}}
    assert document.where(("sizes", 1)) == f"{path}:3"
    assert document.where(("nested", "deep")) == f"{path}:5"
    assert document.where(("absent",)) == str(path)


def test_empty_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path).values == {}
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet=st.sampled_from("a1:-?[]{},&*!|>'\"%#\n\t .e\0\x85é~<@`"), max_size=40))
@example("&a [*a]")
@example("%YAML 9.9\n---\na: 1")
@example("a: |\n x")
def test_f34_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode())
    try:
        document = read_yaml(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right
    else:
        assert all(isinstance(key, str) for key in document.values)
