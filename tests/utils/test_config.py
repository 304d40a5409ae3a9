import dataclasses
import functools
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_cifar
import train_imagenet
from distillers import DISTILLERS, dpk, fitnet, ickd
from models import MODELS
from train_cifar import Settings, read_settings
from utils.config import build, check_arguments, describe, flatten, load_config, section, setting, yaml_text, yaml_value
from utils.engine import build_distiller, warn_of_settings
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("yaml/*.yaml"))


@dataclass
class Leaf:
    rate: float = setting(0.1, "a rate", above=0)
    steps: list[int] = setting([1, 2], "some steps", low=0)
    pair: list[float] = setting([0.9, 0.95], "two numbers")
    kind: str = setting("step", "a kind", choices=["step", "cosine"])
    goal: float | None = setting(None, "a goal")


@dataclass
class Branch:
    leaf: Leaf = section(Leaf)
    flag: bool = setting(False, "a flag")


@dataclass
class Tree:
    name: str = setting("", "a name")
    count: int = setting(3, "a count", low=1, high=99)
    branch: Branch = section(Branch)
    table: dict = setting({"name": "ce"}, "a table")


@dataclass
class Twins:
    branch: Branch = section(Branch)
    other: Leaf = section(Leaf)


def load(tmp_path, text, *overrides, cls=Tree):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(cls, path, overrides)


def fails(key, *words):
    """A context in which an InputError of one line, about `key`, that holds all the words must be raised."""
    pattern = re.escape(f"{key}: ") + "".join(f"(?=.*{re.escape(str(word))})" for word in words) + ".*$"
    return pytest.raises(InputError, match=rf"\A{pattern}(?!\n)")


# Values


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("5E-4", 5e-4), ("-2e3", -2e3), ("+1e2", 100.0), ("1.5e+2", 150.0), (".5e1", 5.0), ("1.e2", 100.0),
    ("3", 3.0), ("0.25", 0.25)])
def test_numbers_with_an_exponent_are_floats_in_a_file_and_in_an_override(tmp_path, text, value):
    for config in (load(tmp_path, f"branch: {{leaf: {{pair: [{text}, 1]}}}}"),
                   load(tmp_path, "{}", f"branch.leaf.pair=[{text}, 1]")):
        assert config.branch.leaf.pair[0] == value
    if value > 0:
        rate = load(tmp_path, "{}", f"branch.leaf.rate={text}").branch.leaf.rate
        assert rate == value and type(rate) is float


@pytest.mark.parametrize("text", ["e3", "1e", "1e-3x", "v1e3", "'1e3'", "resnet8"])
def test_what_only_looks_like_a_number_stays_text(tmp_path, text):
    assert load(tmp_path, f"name: {text}").name == text.strip("'")


def test_what_is_not_set_has_its_default_which_no_two_configs_share(tmp_path):
    first, second = load(tmp_path, "count: 5"), load(tmp_path, "count: 5")
    assert first == second == Tree(count=5)
    first.branch.leaf.steps.append(9)
    first.table["name"] = "kd"
    assert second == Tree(count=5)


@pytest.mark.parametrize(("setting", "words"), [
    ("count: true", ["True", "int"]),
    ("count: 3.0", ["3.0", "int"]),
    ("count: '3'", ["'3'", "int"]),
    ("count: null", ["None", "int"]),
    ("count: 0", ["0 ", "at least 1"]),
    ("count: 100", ["100 ", "at most 99"]),
    ("name: 3", ["3", "str"]),
    ("name: 1e3", ["1000.0", "str"]),
    ("name: [a]", ["['a']", "str"]),
    ("table: 3", ["3", "dict"]),
    ("table: null", ["None", "dict"]),
    ("branch: 3", ["3 is not a section", "leaf", "flag"]),
    ("branch: [1]", ["[1] is not a section", "leaf", "flag"]),
    ("branch: null", ["None is not a section", "leaf", "flag"]),
    ("branch.leaf: text", ["'text' is not a section", "rate", "steps", "pair", "kind", "goal"]),
    ("branch.flag: 1", ["1", "bool"]),
    ("branch.flag: maybe", ["'maybe'", "bool"]),
    ("branch.leaf.rate: true", ["True", "float"]),
    ("branch.leaf.rate: fast", ["'fast'", "float"]),
    ("branch.leaf.rate: 0", ["0.0", "more than 0"]),
    ("branch.leaf.rate: -1e-3", ["-0.001", "more than 0"]),
    ("branch.leaf.rate: .nan", ["nan", "float"]),
    ("branch.leaf.rate: .inf", ["inf", "float"]),
    ("branch.leaf.rate: 1e999", ["inf", "float"]),
    ("branch.leaf.rate: 1" + 400 * "0", ["float"]),
    ("branch.leaf.pair: [0.9, .nan]", ["nan", "list[float]"]),
    ("branch.leaf.pair: [0.9, .inf]", ["inf", "list[float]"]),
    ("branch.leaf.goal: .nan", ["nan", "float | None"]),
    ("branch.leaf.goal: true", ["True", "float | None"]),
    ("branch.leaf.steps: 3", ["3", "list[int]"]),
    ("branch.leaf.steps: [1, 2.5]", ["[1, 2.5]", "list[int]"]),
    ("branch.leaf.steps: [1, true]", ["[1, True]", "list[int]"]),
    ("branch.leaf.steps: [1, [2]]", ["[1, [2]]", "list[int]"]),
    ("branch.leaf.steps: [1, -2]", ["[1, -2]", "at least 0"]),
    ("branch.leaf.kind: linear", ["'linear'", "step, cosine"]),
])
def test_a_value_of_the_wrong_type_or_out_of_bounds_is_named_with_what_is_valid(tmp_path, setting, words):
    key, value = setting.split(": ")
    with fails(key, *words, "valid"):
        load(tmp_path, "{}", f"{key}={value}")
    *parents, last = key.split(".")
    text = f"{last}: {value}"
    for parent in reversed(parents):
        text = f"{parent}: {{{text}}}"
    with fails(key, *words, "valid"):
        load(tmp_path, text)


@pytest.mark.parametrize("setting", ["count=1", "count=99", "branch.leaf.rate=1e-300", "branch.leaf.steps=[]",
                                     "branch.leaf.goal=", "branch.leaf.goal=null", "branch.leaf.goal=79",
                                     "branch.leaf.steps=[0]", "branch.leaf.kind=cosine", "branch.flag=true", "name=",
                                     "table={a: [1, {b: 2}]}"])
def test_values_at_the_edge_of_what_is_valid(tmp_path, setting):
    load(tmp_path, "{}", setting)


def test_an_empty_value_of_a_text_is_the_empty_text(tmp_path):
    assert load(tmp_path, "name: something", "name=").name == load(tmp_path, "name:").name == ""


def test_integers_in_a_list_of_floats_become_floats():  # AdamW refuses betas of two types
    betas = build(Settings, {"connectors": {"betas": [0, 0.5]}}).connectors.betas
    assert betas == [0.0, 0.5] and all(type(beta) is float for beta in betas)


def test_the_nearest_of_many_choices_is_named():
    with fails("student.name", "'resnet_20'", "nearest: resnet20; valid: resnet8"):
        build(Settings, {"student": {"name": "resnet_20"}})


def test_a_choice_of_none_is_shown_as_one_writes_it():
    with fails("teacher.name", "'None'", "valid: null, resnet8"):
        build(Settings, {"teacher": {"name": "None"}})
    assert build(Settings, {"teacher": {"name": None}}).teacher.name is None


# Keys


@pytest.mark.parametrize(("key", "nearest", "valid"), [
    ("nam", "name", "name, count, branch, table"),
    ("branch.flg", "flag", "leaf, flag"),
    ("branch.leaf.steps_", "steps", "rate, steps, pair, kind, goal"),
    ("branch.leaf.RATE", "", "rate, steps, pair, kind, goal"),
    ("branch.leaf.7", "", "rate, steps, pair, kind, goal"),
])
def test_an_unknown_key_is_named_with_the_nearest_and_the_valid_ones(tmp_path, key, nearest, valid):
    with fails(key, "unknown key", f"nearest: {nearest}", f"valid: {valid}"):
        load(tmp_path, "{}", f"{key}=1")
    *parents, last = key.split(".")
    values = {int(last) if last.isdigit() else last: 1}
    for parent in reversed(parents):
        values = {parent: values}
    with fails(key, "unknown key", f"nearest: {nearest}", f"valid: {valid}"):
        build(Tree, values)


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_constructor_of_a_distiller_is_the_schema_of_its_arguments(name):
    schema = DISTILLERS[name].__init__
    if name == "ce":
        with fails("distiller.temperature", "unknown key", "nearest: label_smoothing"):
            check_arguments(schema, {"temperature": 1.0}, "distiller.")
        return
    check_arguments(schema, {"ce_weight": 1, "label_smoothing": 0.5}, "distiller.")
    with fails("distiller.ce_wieght", "unknown key", "nearest: ce_weight", "valid: ", "ce_weight, "):
        check_arguments(schema, {"ce_wieght": 1.0}, "distiller.")
    for value in True, "1.0", None, [1.0], float("nan"), float("inf"):
        with fails("distiller.ce_weight", repr(value), "valid: float"):
            check_arguments(schema, {"ce_weight": value}, "distiller.")
    for positional in "self", "student", "teacher":
        with fails(f"distiller.{positional}", "unknown key"):
            check_arguments(schema, {positional: 1}, "distiller.")


def test_arguments_of_several_types():
    schema = DISTILLERS["dpk"].__init__
    for ratio in "dynamic", 0.5, 1:
        check_arguments(schema, {"ratio": ratio, "stages": None, "schedule_epochs": None}, "distiller.")
    check_arguments(schema, {"stages": [{"student": 1}], "schedule_epochs": 3, "teacher_tokens": False}, "distiller.")
    for arguments, word in (({"ratio": True}, "float | str"), ({"ratio": None}, "float | str"),
                            ({"stages": 3}, "list | None"), ({"schedule_epochs": 2.5}, "int | None"),
                            ({"teacher_tokens": 1}, "bool"), ({"min_tokens": 2.0}, "int")):
        with fails(f"distiller.{next(iter(arguments))}", "is not valid", word):
            check_arguments(schema, arguments, "distiller.")


def test_annotations_of_a_distiller_may_be_missing_or_texts():
    def schema(self, student, teacher, *, plain=3, weight: "float" = 1.0, anything: typing.Any = None,
               table: dict[str, int] = None):
        pass

    check_arguments(schema, {"plain": "x", "weight": 2, "anything": [1], "table": {"a": 1}}, "distiller.")
    with fails("distiller.weight", "'x'", "valid: float"):
        check_arguments(schema, {"weight": "x"}, "distiller.")


# Files


@pytest.mark.parametrize(("text", "words"), [
    (b"count:\t- 1\n\t- 2", ["is not YAML", "line 1"]),
    (b"name: [a, b", ["is not YAML", "line 1"]),
    (b"name: a: b", ["is not YAML", "line 1"]),
    (b"name: *nowhere", ["is not YAML", "nowhere"]),
    (b"name: !!python/object/apply:os.system ['true']", ["is not YAML", "os.system"]),
    (b"\x89PNG\r\n\x1a\n\x00\xff", ["is not YAML"]),
    (b"\x00\x01\x02", ["is not YAML"]),
    (b"count: 2020-13-45", ["is not YAML", "month"]),
    (b"count: 0b_", ["is not YAML"]),
    (b"table: !!map [a]", ["is not YAML"]),
    (b"count: " + 500 * b"[", ["is not YAML"]),
    (b"- name", ["holds a list", "valid: a mapping"]),
    (b"", ["is empty", "valid: a mapping"]),
    (b"# a comment alone\n", ["is empty", "valid: a mapping"]),
    (b"a name", ["holds a str", "valid: a mapping"]),
    (b"3", ["holds a int", "valid: a mapping"]),
])
def test_a_file_that_is_not_a_mapping_in_yaml_is_refused(tmp_path, text, words):
    with fails("--cfg", tmp_path / "settings.yaml", *words):
        load(tmp_path, text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with fails("--cfg", tmp_path / "nowhere.yaml", "No such file", "yaml/"):
        load_config(Tree, tmp_path / "nowhere.yaml")
    with fails("--cfg", tmp_path, "directory", "yaml/"):
        load_config(Tree, tmp_path)
    (tmp_path / "file").touch()
    with fails("--cfg", "Not a directory"):
        load_config(Tree, tmp_path / "file" / "below.yaml")


# Overrides


def test_overrides_replace_the_file_and_the_last_one_wins(tmp_path):
    text = "{count: 2, branch: {leaf: {rate: 0.5, kind: cosine}}, table: {name: kd, weight: 2}}"
    config = load(tmp_path, text, "branch.leaf.rate=1e-2", "count=7", "count=8", "table.weight=3", "name=a=b")
    assert config == Tree("a=b", 8, Branch(Leaf(rate=0.01, kind="cosine")), {"name": "kd", "weight": 3})


@pytest.mark.parametrize(("text", "value"), [
    ("my runs #2", "my runs #2"), ("'my runs #2'", "my runs #2"), (" a  b ", "a  b"), ("''", ""), ("!!str 5", "5"),
    ("", ""), ("#2", ""), ("~/runs", os.path.expanduser("~/runs")), ("'~/runs'", os.path.expanduser("~/runs")),
    ("a~/runs", "a~/runs")])
def test_a_text_is_meant_to_its_end_and_may_begin_at_home(tmp_path, text, value):
    assert load(tmp_path, "{}", f"name={text}").name == value


def test_an_override_makes_the_section_that_the_file_lacks(tmp_path):
    config = load(tmp_path, "count: 2", "branch.leaf.steps=[5, 6]", "branch.leaf.goal=3.5")
    assert config == Tree(count=2, branch=Branch(Leaf(steps=[5, 6], goal=3.5)))


def test_an_override_is_of_one_section_where_a_yaml_anchor_makes_two_alike(tmp_path):
    cfg = load(tmp_path, "branch: {leaf: &leaf {rate: 2.0}}\nother: *leaf", "branch.leaf.rate=3.0", cls=Twins)
    assert (cfg.branch.leaf.rate, cfg.other.rate) == (3.0, 2.0)


@pytest.mark.parametrize(("override", "key", "words"), [
    ("count", "count", ["not an override", "key.sub=value"]),
    ("=3", "=3", ["not an override", "key.sub=value"]),
    ("", "", ["not an override", "key.sub=value"]),
    ("count.sub=3", "count.sub", ["count is not a section", "sub"]),
    ("branch.leaf.rate.sub.deep=3", "branch.leaf.rate.sub.deep", ["rate is not a section"]),
    ("name=[", "name", ["'['", "not a YAML value"]),
    ("name=2020-13-45", "name", ["not a YAML value"]),
    ("name=" + 500 * "[", "name", ["not a YAML value"]),
    ("name=!!python/name:os.system", "name", ["not a YAML value"]),
    (".=3", "", ["unknown key"]),
    ("branch..x=3", "branch.", ["unknown key"]),
])
def test_a_bad_override_is_named(tmp_path, override, key, words):
    with fails(key, *words):
        load(tmp_path, "{count: 1, branch: {leaf: {rate: 1}}}", override)


# And back to text


@pytest.mark.parametrize("config", [
    Tree(),
    Tree("1e3", 9, Branch(Leaf(1e-5, [], [1e-300, 2.0], "cosine", 0.0), True), {"name": "kd", "a": [{"b": 1e-4}]}),
    *map(Tree, ("", "null", "true", "3", "0x1f", "1e-3", ".5E4", "a: b", "- a", "ü\n\t'\"", "2020-01-01")),
])
def test_the_text_of_a_config_loads_to_an_equal_config(tmp_path, config):
    assert load(tmp_path, yaml_text(config)) == config
    assert load(tmp_path, "{}", f"name={yaml_value(config.name)}", f"table={yaml_value(config.table)}") == \
        Tree(name=config.name, table=config.table)


def test_a_long_value_stays_on_one_line():
    assert yaml_value(list(range(100))) == str(list(range(100)))


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata


@pytest.mark.parametrize("cls", [Tree, Settings])
def test_the_help_lists_every_setting_with_default_meaning_and_choices(cls, tmp_path):
    lines, expected = describe(cls), list(leaves(cls()))
    assert len(lines) == len(expected)
    for line, (key, default, metadata) in zip(lines, expected):
        assert line.startswith(f"  {key}={yaml_value(default)} ") and metadata["help"] in line
        assert all(yaml_value(choice) in line for choice in metadata["choices"] or ())
    overrides = [f"{key}={yaml_value(default)}" for key, default, _ in expected]
    assert load(tmp_path, "{}", *overrides, cls=cls) == cls()


@pytest.mark.parametrize("cls", [Settings, train_imagenet.Settings])
def test_no_number_is_below_zero_and_no_choice_another(cls, tmp_path):
    for key, default, metadata in leaves(cls()):
        if metadata["choices"]:
            with fails(key, "'odd'", metadata["choices"][-1]):
                load(tmp_path, "{}", f"{key}=odd", cls=cls)
        elif type(default) in (int, float, list):
            below = [type(number)(-1) for number in default] if isinstance(default, list) else -1
            with fails(key, "-1", "valid: "):
                load(tmp_path, "{}", f"{key}={below}", cls=cls)
        else:
            assert type(default) in (str, bool, dict, type(None))


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2]}


# The files of the repository


@pytest.fixture(scope="module")
def map_shapes():
    """The function of that name of all distillers, each network asked once."""
    with pytest.MonkeyPatch.context() as patch:
        shapes = functools.cache(dpk.map_shapes)
        for module in dpk, fitnet, ickd:
            patch.setattr(module, "map_shapes", shapes)
        yield shapes


@pytest.fixture(scope="module")
def read(map_shapes):
    """read_settings, each network without numbers made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cifar, "MODELS", {name: functools.cache(model) for name, model in MODELS.items()})
        yield functools.cache(read_settings)


@pytest.fixture(scope="module")
def network(map_shapes):
    """Networks of 100 classes by name, each made once. The numbers are not drawn, which for DPK would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in "uniform_", "normal_":
            patch.setattr(torch.Tensor, draw, lambda self, *args, **kwargs: self)
        yield functools.cache(lambda name: MODELS[name](num_classes=100))


def test_there_is_a_file_for_every_distiller():
    assert {path.stem.split("_")[0] for path in FILES} == {*DISTILLERS, "quickstart"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_yaml_file_builds_and_says_what_it_is(path, read, network, map_shapes, capsys):
    text, cfg = path.read_text(), read(path)
    assert re.findall(r"train_cifar\.py --cfg (\S+)", text) == [f"yaml/{path.name}"]
    warn_of_settings(cfg)
    assert not capsys.readouterr().err
    assert cfg.name == path.stem and "name" not in re.findall(r"^\w+", text, re.M)
    if not path.stem.startswith("quickstart"):
        assert path.stem.split("_")[0] == cfg.distiller["name"]
        small = cfg.student.name in ("mobilenetv2", "shufflenetv1", "shufflenetv2")
        assert (cfg.batch_size, cfg.epochs, cfg.optimizer.lr) == (64, 240, 0.01 if small else 0.05)
        assert (cfg.optimizer.schedule, cfg.optimizer.milestones, cfg.optimizer.gamma) == ("step", [150, 180, 210], 0.1)
        assert (cfg.data.name, cfg.seed, cfg.optimizer.weight_decay) == ("cifar100", 0, 5e-4)

    student = network(cfg.student.name)
    teacher = network(cfg.teacher.name) if cfg.teacher.name else None
    distiller = build_distiller(cfg, student, teacher)
    assert isinstance(distiller, DISTILLERS[cfg.distiller["name"]]) and distiller.student is student

    stages = {"dpk": cfg.distiller.get("stages", []), "fitnet": [{
        name: cfg.distiller.get(f"{name}_stage") for name in ("student", "teacher")}]}.get(cfg.distiller["name"], [])
    for stage in stages:
        for name, model in ("student", student), ("teacher", teacher):
            assert stage[name] in range(1, len(map_shapes(model, 32)))
    if cfg.distiller["name"] == "dpk":
        assert distiller.plan == [(stage["student"], stage["teacher"], stage["weight"]) for stage in stages]


@pytest.mark.parametrize("path", [path for path in FILES if "teacher:" in path.read_text()], ids=lambda path: path.stem)
def test_the_teacher_of_a_file_is_what_its_own_file_trains(path, read):
    cfg = read(path)
    other = read(ROOT / cfg.teacher.cfg)
    assert other.student.name == cfg.teacher.name and other.distiller["name"] == "ce"
    assert cfg.teacher.checkpoint in (f"{other.runs}/{other.name}/student.pth", f"checkpoints/{cfg.teacher.name}.pth")
    assert dataclasses.asdict(other.data) == dataclasses.asdict(cfg.data)
    if cfg.baseline:
        assert read(ROOT / cfg.baseline).student == cfg.student
