"""Settings: a YAML file and `key.sub=value` overrides into a dataclass, with every mistake named in one line."""

import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing

import yaml

from utils.errors import InputError, one_line


class NumberLoader(yaml.SafeLoader):
    """A SafeLoader for which 1e-3 is a number (YAML 1.1 takes it for a string unless written 1.0e-3) and a key that is
    there twice a mistake.
    """

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class NumberDumper(yaml.SafeDumper):
    """Its counterpart, which quotes a text such as '1e3'."""


for resolver in NumberLoader, NumberDumper:
    resolver.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def setting(default, help, *, choices=None, low=None, above=None, high=None):
    """A dataclass field with its meaning and its valid values: one of `choices`, at least `low` or more than `above`,
    at most `high`.
    """
    metadata = {"help": help, "choices": choices, "low": low, "above": above, "high": high}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls):
    """A dataclass field that is a dataclass of settings itself."""
    return dataclasses.field(default_factory=cls)


def load_config(cls, path, overrides=()):
    """The settings of YAML file `path`, then of `overrides` ("key.sub=value"), as a `cls`.

    Raises InputError, which names the key and the valid values.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, NumberLoader)
    except OSError as error:
        raise InputError("--cfg", f"cannot read {path}: {error.strerror}; valid: a YAML file, see yaml/") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, or a date such as 2020-13-45
        raise InputError("--cfg", f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise InputError("--cfg", f"{path} {found}; valid: a mapping of settings")
    for override in overrides:
        _override(values, override)
    return build(cls, values)


def _override(values, override):
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(override, "not an override; valid: key.sub=value, for instance optimizer.lr=0.1")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent, {})
        if not isinstance(inner, dict):
            raise InputError(key, f"{parent} is not a section, so it has no {last}")
        values[parent] = dict(inner)  # its own: by a YAML anchor two sections may be one
        values = values[parent]
    try:
        value = yaml.load(text, NumberLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(key, f"{text!r} is not a YAML value") from None
    # A plain text is meant to its end, also where YAML would see a comment: runs='my runs #2'
    values[last] = text.strip() if isinstance(value, str) and value[:1] == text.strip()[:1] else value


def build(cls, values, prefix=""):
    """A dataclass of settings from a (nested) mapping, each key and value checked."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    checked = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in fields:
            raise unknown_key(key, name, fields)
        field = fields[name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, dict):
                valid = ", ".join(inner.name for inner in dataclasses.fields(field.type))
                raise InputError(key, f"{value!r} is not a section; valid keys: {valid}")
            checked[name] = build(field.type, value, f"{key}.")
        else:
            limits = {limit: valid for limit, valid in field.metadata.items() if limit != "help"}
            checked[name] = check_value(key, value, field.type, **limits)
    return cls(**checked)


def keyword_arguments(function, hidden):
    """{name: inspect.Parameter} of the keyword-only arguments of a function, but for those in `hidden`."""
    return {name: parameter for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in hidden}


def check_arguments(function, values, prefix, hidden=()):
    """Check a mapping of keyword arguments against the signature of `function`: the constructor is the schema.

    hidden: arguments that are no settings.
    """
    parameters = keyword_arguments(function, hidden)
    for name, value in values.items():
        if name not in parameters:
            raise unknown_key(f"{prefix}{name}", name, parameters)
        check_value(f"{prefix}{name}", value, parameters[name].annotation)


def unknown_key(key, name, valid):
    """An InputError with the nearest of the valid keys, and all of them."""
    nearest = difflib.get_close_matches(str(name), list(valid), 1, 0)
    hint = f"nearest: {nearest[0]}; valid: {', '.join(valid)}" if nearest else "there are no keys here"
    return InputError(key, f"unknown key; {hint}")


def check_value(key, value, annotation, choices=None, low=None, above=None, high=None):
    """`value` where it is of the type `annotation` and within its bounds (an int does for a float)."""
    if value is None and annotation is str:  # `key=` on the command line, `key:` in a file
        value = ""
    if annotation is str and isinstance(value, str) and value.startswith("~/"):  # no shell does it behind key=
        value = os.path.expanduser(value)
    if not _is_a(value, annotation):
        name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        finite = ", finite" if isinstance(value, float) and not math.isfinite(value) else ""
        raise InputError(key, f"{value!r} is not valid; valid: {name}{finite}")
    if annotation is float:
        value = float(value)
    if annotation == list[float]:
        value = [float(number) for number in value]
    if choices and value not in choices:
        valid = [yaml_value(choice) for choice in choices]
        nearest = f"nearest: {difflib.get_close_matches(str(value), valid, 1, 0)[0]}; " if len(valid) > 5 else ""
        raise InputError(key, f"{value!r} is not valid; {nearest}valid: {', '.join(valid)}")
    for number in value if isinstance(value, list) else [value]:
        for bound, broken in ((f"at least {low}", low is not None and number < low),
                              (f"more than {above}", above is not None and number <= above),
                              (f"at most {high}", high is not None and number > high)):
            if broken:
                raise InputError(key, f"{value!r} is not valid; valid: {bound}")
    return value


def _is_a(value, annotation):
    if annotation in (typing.Any, inspect.Parameter.empty):
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(_is_a(item, typing.get_args(annotation)[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and abs(value) < 2**1024  # finite, and an int not too large for a float
    if annotation is int:
        return type(value) is int
    return isinstance(value, typing.get_origin(annotation) or annotation)


def describe(cls, prefix=""):
    """The lines of --help: every setting, its default, its meaning and its choices."""
    lines = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            lines += describe(field.type, f"{prefix}{field.name}.")
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        help, choices = field.metadata["help"], field.metadata["choices"]
        lines.append(f"  {prefix + field.name + '=' + yaml_value(default):<38} "
                     f"{help}{' (' + ', '.join(map(yaml_value, choices)) + ')' if choices else ''}")
    return lines


def help_text(cls, functions, hidden=()):
    """The text of --help: the settings, then {name: constructor} with their keyword-only arguments and docstrings.

    hidden: arguments that are no settings.
    """
    lines = ["settings, in the YAML file or as key.sub=value (here with their defaults):", *describe(cls)]
    for name, function in functions.items():
        lines += ["", f"distiller.name={name}"]
        lines += [f"  distiller.{key}={yaml_value(argument.default)}"
                  for key, argument in keyword_arguments(function, hidden).items()]
        lines += [f"  | {line}".rstrip() for line in inspect.getdoc(function).splitlines()]
    return "\n".join(lines)


def yaml_value(value):
    """A value as one writes it in a YAML file, on one line."""
    return yaml.dump(value, Dumper=NumberDumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def yaml_text(config):
    """A dataclass of settings as the text of a YAML file."""
    return yaml.dump(dataclasses.asdict(config), Dumper=NumberDumper, sort_keys=False)


def flatten(values, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
